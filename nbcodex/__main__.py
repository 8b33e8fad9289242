"""`python -m nbcodex` is the command `nbcodex`."""

import sys

from nbcodex.cli import main

sys.exit(main())
