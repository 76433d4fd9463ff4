"""What is known before a GPU is paid for: costs, hazards, what the model sees, exact resume."""
