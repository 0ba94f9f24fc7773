"""A step's responses as they are written: perhaps while the step before trains, off-policy by one.

What is under way when a checkpoint is taken is waited for and kept in it: the weights that wrote it
are gone by the time the run is resumed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_opd.parallel import Parallel
from megatron_opd.rollout import RolloutEngine
from megatron_opd.rollout.vllm_server import Pending, ServerEngine
from megatron_opd.types import Prompt, Rollout

_ARRAYS = {"top_ids": np.int32, "top_logp": np.float32}


@dataclass(frozen=True)
class Ahead:
    """The responses to the prompts of one step; those of this replica, written or under way."""

    updates: int  # of the weights that write them
    prompts: tuple[int, ...]  # indices, of all replicas, in the order of the step
    writing: Pending | list[Rollout]

    def settled(self, engine: RolloutEngine) -> "Ahead":
        """Wait until the responses are there; collective."""
        if isinstance(self.writing, list):
            return self
        assert isinstance(engine, ServerEngine)
        return replace(self, writing=engine.collect(self.writing))

    @property
    def rollouts(self) -> list[Rollout]:
        """The responses, once they are settled."""
        assert isinstance(self.writing, list)
        return self.writing

    def state_dict(self, parallel: Parallel) -> dict[str, Any]:
        """Return all replicas' responses as JSON; collective, and wants them settled."""
        shares: list[Any] = [None] * parallel.dp
        own = [_to_json(rollout) for rollout in self.rollouts]
        dist.all_gather_object(shares, own, group=parallel.dp_group)
        rows = [row for share in shares for row in share]
        return {"updates": self.updates, "prompts": self.prompts, "rollouts": rows}


def load(state: dict[str, Any], prompts: Iterable[Prompt], parallel: Parallel) -> Ahead:
    """Return this replica's share of what `state_dict` kept, at whatever layout that was."""
    known = {prompt.index: prompt for prompt in prompts}
    mine = state["prompts"][parallel.dp_rank :: parallel.dp]
    rows = [row for index in mine for row in state["rollouts"] if row["prompt"] == index]
    rollouts = [_from_json(row, known) for row in rows]
    return Ahead(state["updates"], tuple(state["prompts"]), rollouts)


def _to_json(rollout: Rollout) -> dict[str, Any]:
    row = {name: value for name, value in vars(rollout).items() if value is not None}
    arrays = {name: row[name].tolist() for name in _ARRAYS if name in row}
    return {**row, **arrays, "prompt": rollout.prompt.index}


def _from_json(row: dict[str, Any], known: dict[int, Prompt]) -> Rollout:
    arrays = {name: np.array(row[name], dtype) for name, dtype in _ARRAYS.items() if name in row}
    tuples = {name: tuple(row[name]) for name in ("response_ids", "logp")}
    return Rollout(**{**row, **arrays, **tuples, "prompt": known[row["prompt"]]})
