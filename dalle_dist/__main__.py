"""`python -m dalle_dist` = `dalle-dist`."""

from dalle_dist.cli import program

program()
