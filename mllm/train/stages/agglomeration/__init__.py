"""The stage kind ``agglomeration``: one encoder learns what several frozen ones see."""
