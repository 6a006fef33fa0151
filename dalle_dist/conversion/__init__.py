"""`dalle-dist convert`: what a source is, what it becomes, and the proof that it is the same."""
