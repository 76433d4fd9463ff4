"""How does a checkpoint answer over HTTP? Everything that touches vLLM lives here."""
