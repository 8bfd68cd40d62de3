"""``python -m ep_train`` is ``ep-train``."""

import sys

from .cli import main

sys.exit(main())
