"""What can be typed? One file per verb; a verb imports what it needs only when it runs."""
