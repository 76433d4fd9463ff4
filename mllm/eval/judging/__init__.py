"""Verdicts that another model gives, where a benchmark has no exact rule."""
