"""How do codes become pixels by diffusion, in place of a tokenizer's own decoder? See `decoder`."""
