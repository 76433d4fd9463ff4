"""The stage kind ``exits``: an encoder that may stop early learns when, from labelled pictures."""
