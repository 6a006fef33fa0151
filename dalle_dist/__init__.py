"""dalle-dist: train DALL-E from a laptop's CPU to a cluster, with the same commands."""

__version__ = "0.1.0"
