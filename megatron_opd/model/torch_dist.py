"""A model's weights in Megatron's `torch_dist` format: saved at one layout, loaded at any other."""

import multiprocessing
import os
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_opd.model.config import HFConfig
from megatron_opd.model.dist_files import MegatronFiles
from megatron_opd.model.gpt import Stage
from megatron_opd.model.hf_files import fresh_folder, write_description
from megatron_opd.model.parts import die_with
from megatron_opd.model.weights import fill_from
from megatron_opd.parallel import Parallel

HF = "hf"  # subfolder with config.json, generation defaults and tokenizer


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
    manager.start(die_with, (os.getpid(),))
    filesystem_async._results_queue = manager.Queue()


def write_companions(
    source: HFConfig, folder: Path, dtype: torch.dtype, stop_ids: tuple[int, ...] = ()
) -> None:
    """Write `folder/hf`: what turns the weights in `folder` back into a Hugging Face checkpoint.

    Raises:
        ValueError: a file of `source` cannot be read.
    """
    (folder / HF).mkdir()
    write_description(source, folder / HF, dtype, stop_ids)


def save_megatron(model: Stage, source: HFConfig, folder: str | Path, parallel: Parallel) -> None:
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
    """Load what `save_megatron`, a training run or Megatron-LM wrote, at any layout; collective.

    What else is stored there, such as the state of an optimiser, is left alone.

    Raises:
        ValueError: `folder` is not such a checkpoint, or is one of another model.
    """

    def load() -> None:
        fill_from(model, MegatronFiles(folder, model.architecture))

    parallel.agree(load)
