"""A model's weights in Megatron's `torch_dist` format: saved at one layout, loaded at any other."""

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_opd.model.config import HFConfig
from megatron_opd.model.gpt import Stage
from megatron_opd.model.hf_files import fresh_folder, write_description
from megatron_opd.parallel import Parallel

HF = "hf"  # subfolder with config.json, generation defaults and tokenizer
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def sharded_weights(model: Stage) -> dict[str, Any]:
    """Return Megatron's sharded state of the parameters alone, under the names of `model`.

    Transformer Engine adds `_extra_state` objects (fp8 scales, none here): without them, what one
    layer spec saved the other one loads.
    """
    return {
        f"{index}.{key}": value
        for index, chunk in enumerate(model.chunks)
        for key, value in chunk.sharded_state_dict().items()
        if not key.endswith("_extra_state")
    }


def fork_checkpoint_writer() -> None:
    """Let Megatron's checkpoint writer fork its queue instead of spawning it, without CUDA.

    filesystem_async.py:54 spawns a Manager, which re-imports `__main__`: 2-4 s on every rank. A
    forked one also holds all that its rank held, so on Linux it does not outlive a killed rank.
    """
    if torch.cuda.is_available() or filesystem_async._results_queue is not None:
        return
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    if sys.platform == "linux":
        manager.start(_die_with, (os.getpid(),))
    else:
        manager.start()
    filesystem_async._results_queue = manager.Queue()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def write_companions(
    source: HFConfig, folder: Path, dtype: torch.dtype, stop_ids: tuple[int, ...] = ()
) -> None:
    """Write `folder/hf`: what turns the weights in `folder` back into a Hugging Face checkpoint.

    Raises:
        ValueError: a file of `source` cannot be read.
    """
    (folder / HF).mkdir()
    write_description(source, folder / HF, dtype, stop_ids)


def save_megatron(
    model: Stage, source: HFConfig, folder: str | Path, parallel: Parallel
) -> None:
    """Write `folder` (torch_dist, plus `hf/`), complete or not at all; collective.

    Raises:
        ValueError: `folder` exists.
    """
    final = Path(folder)
    draft = final.with_name(f"tmp_{final.name}")
    parallel.owner(lambda: fresh_folder(draft, final))
    fork_checkpoint_writer()
    dist_checkpointing.save(sharded_weights(model), str(draft))

    def publish() -> None:
        write_companions(source, draft, model.config.params_dtype)
        draft.rename(final)

    parallel.owner(publish)


def load_megatron(model: Stage, folder: str | Path, parallel: Parallel) -> None:
    """Load what `save_megatron` or a training run wrote, at any layout; collective.

    What else is stored there, such as the state of an optimiser, is left alone.

    Raises:
        ValueError: `folder` is not such a checkpoint, or is one of another model.
    """

    wanted = sharded_weights(model)
    parallel.agree(lambda: _check(wanted, str(folder)))
    state: Any = dist_checkpointing.load(wanted, str(folder))
    missing = model.load_state_dict(state, strict=False).missing_keys
    lost = [key for key in missing if not key.endswith("_extra_state")]
    assert not lost, f"Megatron loaded no value for {lost}"


def _check(wanted: dict[str, Any], folder: str) -> None:
    """Compare with what is stored: Megatron's own error is a page from every rank."""
    try:
        stored = dist_checkpointing.load_tensors_metadata(folder)
    except CheckpointingException as problem:
        told = " ".join(str(problem).split())
        raise ValueError(f"{folder}: not a Megatron checkpoint: {told}") from None
    for tensor in wanted.values():
        found = stored.get(tensor.key)
        if found is None:
            raise ValueError(f"{folder}: {tensor.key} is missing: a checkpoint of another model")
        fixed = isinstance(tensor, ShardedTensor) and not tensor.allow_shape_mismatch
        if fixed and found.global_shape != tensor.global_shape:
            got, expected = list(found.global_shape), list(tensor.global_shape)
            raise ValueError(f"{folder}: {tensor.key} has shape {got}, expected {expected}")
