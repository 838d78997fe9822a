"""How hvtrain starts itself again, for processes of its own."""

from __future__ import annotations

import sys
from pathlib import Path

HVTRAIN = (sys.executable, str(Path(__file__).resolve().parents[1] / "launcher" / "__main__.py"))
"""The command up to its arguments. A script's path, not -m: with -m Python looks for modules in the working
directory first, where a user's data may lie in `shards/` and a file be called `types.py`."""
