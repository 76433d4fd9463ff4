"""How does a server draw?"""
