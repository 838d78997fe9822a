"""The commands, in the order in which `hvtrain --help` shows them."""

from launcher.commands import configs, init, data, fit, run, runs, shards, slices, jobs, merge, lora, launch, doctor, info  # noqa: I001, F401 the order is the help's
