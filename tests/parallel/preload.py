"""The libraries that ranks import. The process that they are forked from imports them, once,
and runs nothing of them. Our own modules are not among them: a rank finds those by its parent's
path and environment, as ever."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes for a GPU

import av as av
import deepspeed as deepspeed
import pytest as pytest
import yunchang as yunchang
from diffusers import AutoencoderKLHunyuanVideo as AutoencoderKLHunyuanVideo
from diffusers import AutoencoderKLWan as AutoencoderKLWan
from transformers import CLIPTextModel as CLIPTextModel
from transformers import LlamaModel as LlamaModel

gc.freeze()  # what is shared with the ranks stays shared
