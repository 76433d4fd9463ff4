"""How is a visual tokenizer trained: its pictures, the model the trainer sees, the adversarial step, held-out scores."""
