"""Hugging Face configuration → Megatron model, and its weights in and out."""

from megatron_opd import platform

platform.activate()  # the modules below import Megatron-Core

from megatron_opd.model.build import build_model  # noqa: E402
from megatron_opd.model.config import (  # noqa: E402
    Architecture,
    architecture,
    check_layout,
    padded_vocab,
    read_config,
)
from megatron_opd.model.gpt import HiddenGPT, Stage, enter_head, forward  # noqa: E402
from megatron_opd.model.transformer import transformer_config  # noqa: E402
from megatron_opd.model.weights import (  # noqa: E402
    check_files,
    export_hf,
    init_random,
    load_head,
    load_hf,
    save_hf,
)

__all__ = [
    "Architecture",
    "HiddenGPT",
    "Stage",
    "architecture",
    "build_model",
    "check_files",
    "check_layout",
    "enter_head",
    "export_hf",
    "forward",
    "init_random",
    "load_head",
    "load_hf",
    "padded_vocab",
    "read_config",
    "save_hf",
    "transformer_config",
]
