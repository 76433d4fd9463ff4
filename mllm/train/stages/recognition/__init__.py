"""The stage kind ``recognition``: an encoder learns to read pages and to see pictures as before."""
