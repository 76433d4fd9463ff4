"""How do checkpoints of other projects become ours?"""
