"""Generate images for prompts: `Generator.load(release).generate(prompt)`."""

from dalle_dist.generate.generator import GeneratedImage, Generator

__all__ = ["GeneratedImage", "Generator"]
