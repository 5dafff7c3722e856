"""``python -m fastrank`` is the command line."""

import sys

from fastrank.cli import main

sys.exit(main())
