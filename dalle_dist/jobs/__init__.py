"""Slurm jobs: the scripts, what they ask, and how one is planned, written and submitted."""
