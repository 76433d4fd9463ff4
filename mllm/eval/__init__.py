"""How is a model measured, and by which rule did each number come about?"""
