"""What is seen of a run while it trains and afterwards: rates, curves, leaps of the loss, run.json."""
