"""Questions about speed, memory and gradient quality: ``python -m benchmarks list``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("ep_train") is None:  # a checkout whose library was built in place, not installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
