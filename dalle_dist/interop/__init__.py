"""Models of other programs: read from their files, run, fine-tuned, and written back."""
