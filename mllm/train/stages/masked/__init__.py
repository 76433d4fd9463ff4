"""The stage kind ``masked``: an encoder learns from pictures alone."""
