"""What do models learn from: sources of samples, mixtures, packing, batches, checks, and the demo's own data."""
