"""How is a diffusion decoder trained: the model the trainer sees, held-out scores of sampled pictures."""
