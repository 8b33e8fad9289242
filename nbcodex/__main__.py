"""`python -m nbcodex` is the command `nbcodex`."""

from __future__ import annotations

import sys

from nbcodex.cli import main

sys.exit(main())
