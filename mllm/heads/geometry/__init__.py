"""Which heads teach a model where the cameras stood and how far things are, and are never run when it answers?"""
