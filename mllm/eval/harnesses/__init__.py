"""How do our models run inside other people's harnesses?"""
