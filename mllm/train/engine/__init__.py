"""How do gradients become one update: parameter groups, optimizer, rate, and processes that share them."""
