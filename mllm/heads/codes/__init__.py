"""How does a model draw: grammar, heads, targets, generation."""
