"""Hugging Face configuration → Megatron model, and its weights in and out."""

from megatron_opd.model.build import build_model
from megatron_opd.model.config import (
    Architecture,
    architecture,
    check_layout,
    padded_vocab,
    read_config,
)
from megatron_opd.model.gpt import HiddenGPT, enter_head, forward
from megatron_opd.model.weights import export_hf, init_random, load_hf, save_hf

__all__ = [
    "Architecture",
    "HiddenGPT",
    "architecture",
    "build_model",
    "check_layout",
    "enter_head",
    "export_hf",
    "forward",
    "init_random",
    "load_hf",
    "padded_vocab",
    "read_config",
    "save_hf",
]
