"""Rules that span several keys of a config. Besides a command's run(cfg), the only code that sees all of it.

No torch here, so that `hvtrain launch` refuses a bad config before it starts a process.
"""

from hvtrain.config.rules.encode import check_encode
from hvtrain.config.rules.generate import check_generate
from hvtrain.config.rules.merge import check_merge, check_merge_values
from hvtrain.config.rules.train import check_train

__all__ = ["check_encode", "check_generate", "check_merge", "check_merge_values", "check_train"]
