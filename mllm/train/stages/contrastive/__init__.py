"""How is a CLIP-style encoder itself trained? The stage kind contrastive."""
