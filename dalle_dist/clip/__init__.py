"""CLIP (arXiv 2103.00020): how well an image fits a caption, by any in Hugging Face's format."""
