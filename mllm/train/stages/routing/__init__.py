"""How does a router learn which experts help? The stage kind routing: measured losses, labels, training, report."""
