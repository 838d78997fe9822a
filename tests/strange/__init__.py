"""An architecture that exists only to be different, and every verb with it.

It lies in `found/`, where the program finds it as it finds anyone's own: by Python's path.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hvtrain
from hvtrain import models

FOUND = Path(__file__).parent / "found"


@contextmanager
def discovered(folder: Path = FOUND) -> Iterator[None]:
    """In this process and those that it starts."""
    before = hvtrain.__path__, models.__path__, os.environ.get("PYTHONPATH")
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before[2], str(folder)]))
    for package in (hvtrain, models):
        package.__path__ = pkgutil.extend_path(package.__path__, package.__name__)
    models.all_specs.cache_clear()
    try:
        yield
    finally:
        hvtrain.__path__, models.__path__ = before[:2]
        sys.path.remove(str(folder))
        os.environ.pop("PYTHONPATH")
        if before[2] is not None:
            os.environ["PYTHONPATH"] = before[2]
        models.all_specs.cache_clear()
