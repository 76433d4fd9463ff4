"""How does a model answer with masks: the head, its decoders, losses and answers."""
