"""The commands, in the order in which `hvtrain --help` shows them."""

# ruff: noqa: F401, I001
from launcher.commands import configs, init, data, fit, run, runs, shards, slices, jobs, merge, lora, launch
from launcher.commands import doctor, info
