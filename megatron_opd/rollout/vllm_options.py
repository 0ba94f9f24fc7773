"""What a user may tell vLLM, found out before anything is loaded."""

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

INSTALL = "`make vllm` installs it for a CPU, pip install 'megatron_opd[gpu]' for GPUs"
SET_BY = {  # EngineArgs that other keys decide, and which
    "model": "student.path",
    "tokenizer": "student.path",
    "dtype": "student.dtype",
    "tensor_parallel_size": "rollout.tp",
    "max_num_seqs": "rollout.batch_size",
    "max_model_len": "data.max_prompt_tokens + rollout.max_tokens",
    "seed": "seed",
}
OURS = (
    "load_format",
    "hf_overrides",
    "generation_config",
    "distributed_executor_backend",
    "pipeline_parallel_size",
    "data_parallel_size",
    "logprobs_mode",
    "max_logprobs",
    "weight_transfer_config",
    "worker_extension_cls",
    "worker_cls",
    "enable_sleep_mode",
    "skip_tokenizer_init",
)


def installed() -> bool:
    """Say whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def wrong_options(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every option that vLLM does not have, or that is not the user's to set."""
    for name in options:
        if name in SET_BY:
            yield f"vllm.{name}: is set by {SET_BY[name]}; set that"
        elif name in OURS:
            yield f"vllm.{name}: is what the engine depends on and cannot be set"
        elif name not in _fields():
            close = difflib.get_close_matches(name, _fields(), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            yield f"vllm.{name}: vLLM's EngineArgs have no such field{hint}"


def unsupported_head(head_dim: int) -> Iterator[str]:
    """Yield a line if vLLM's attention on a CPU does not have this size of a head."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        listed = ", ".join(map(str, sizes))
        yield f"head_dim={head_dim}, but vLLM on a CPU has attention heads of {listed} only"


def _fields() -> set[str]:
    from vllm.engine.arg_utils import EngineArgs  # seconds: only where it is needed

    return {field.name for field in dataclasses.fields(EngineArgs)}
