"""What do the shipped demos learn from? Pictures drawn here from tables, without a download."""
