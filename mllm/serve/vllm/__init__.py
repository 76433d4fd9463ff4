"""How does vLLM run our checkpoints? Everything here imports vLLM or is called by it."""
