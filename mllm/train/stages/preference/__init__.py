"""How does a model learn from preferences or rewards? The stage kinds dpo and grpo."""
