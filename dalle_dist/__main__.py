"""`python -m dalle_dist` = `dalle-dist`."""

import sys

from dalle_dist.cli import main

sys.exit(main())
