"""What do predictions add up to, how sure is it, and how is it shown?"""
