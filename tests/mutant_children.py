"""A pytest plugin for `make mutate`: while mutmut notes which test calls which function, it does so in its
own process only. A child process would look for mutmut's settings in its working directory, and fail. And
it loads what PyTorch's first optimizer and first operator load, before mutmut forks: else each mutant
would, for a second or two."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch._dynamo  # noqa: F401  see above

_start = subprocess.Popen.__init__


def _without_notes(self: subprocess.Popen, *args: Any, **options: Any) -> None:
    env = dict(os.environ if options.get("env") is None else options["env"])
    if env.get("MUTANT_UNDER_TEST") == "stats":
        del env["MUTANT_UNDER_TEST"]
        options["env"] = env
    _start(self, *args, **options)


subprocess.Popen.__init__ = _without_notes  # type: ignore[method-assign]
