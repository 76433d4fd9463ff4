"""What is kept of a run: states to resume from, and the Hugging Face directory at the end."""
