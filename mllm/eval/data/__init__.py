"""How do a benchmark's files become questions with targets?"""
