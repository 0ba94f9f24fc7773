"""Responses that are not trained on yet: of the step to come, or of the rest of a round.

They are written by weights that have changed by the time the student learns from them: while the
step before trains (`rollout.async_depth`), or for several steps at once
(`train.updates_per_rollout`). What is left of them when a checkpoint is taken is waited for and
kept in it: the weights that wrote it are gone by the time the run is resumed.
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
Key = tuple[int, int]  # index and copy of a prompt


@dataclass(frozen=True)
class Ahead:
    """The responses to the prompts of one or more steps; those of this replica."""

    updates: int  # of the weights that write them
    prompts: tuple[Key, ...]  # of all replicas, in the order of the steps
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

    def split(self, prompts: int) -> tuple[list[Rollout], "Ahead | None"]:
        """Return the responses to the first `prompts` of all replicas, and what is left, if any."""
        first, later = set(self.prompts[:prompts]), self.prompts[prompts:]
        now = [rollout for rollout in self.rollouts if key(rollout.prompt) in first]
        rest = [rollout for rollout in self.rollouts if key(rollout.prompt) not in first]
        return now, Ahead(self.updates, later, rest) if later else None

    def state_dict(self, parallel: Parallel) -> dict[str, Any]:
        """Return all replicas' responses as JSON; collective, and wants them settled."""
        shares: list[Any] = [None] * parallel.dp
        own = [_to_json(rollout) for rollout in self.rollouts]
        dist.all_gather_object(shares, own, group=parallel.dp_group)
        rows = [row for share in shares for row in share]
        return {"updates": self.updates, "prompts": self.prompts, "rollouts": rows}


def key(prompt: Prompt) -> Key:
    """Return what tells a prompt from the others of a round."""
    return prompt.index, prompt.copy


def load(state: dict[str, Any], prompts: Iterable[Prompt], parallel: Parallel) -> Ahead:
    """Return this replica's share of what `state_dict` kept, at whatever layout that was."""
    known = {prompt.index: prompt for prompt in prompts}
    keys = tuple((index, copy) for index, copy in state["prompts"])
    by_key: dict[Key, list[Rollout]] = {one: [] for one in keys}
    for row in state["rollouts"]:
        by_key[tuple(row["prompt"])].append(_from_json(row, known))
    mine = [rollout for one in keys[parallel.dp_rank :: parallel.dp] for rollout in by_key[one]]
    return Ahead(state["updates"], keys, mine)


def _to_json(rollout: Rollout) -> dict[str, Any]:
    row = {name: value for name, value in vars(rollout).items() if value is not None}
    arrays = {name: row[name].tolist() for name in _ARRAYS if name in row}
    return {**row, **arrays, "prompt": key(rollout.prompt)}


def _from_json(row: dict[str, Any], known: dict[int, Prompt]) -> Rollout:
    arrays = {name: np.array(row[name], dtype) for name, dtype in _ARRAYS.items() if name in row}
    tuples = {name: tuple(row[name]) for name in ("response_ids", "logp")}
    index, copy = row["prompt"]
    prompt = replace(known[index], copy=copy)
    return Rollout(**{**row, **arrays, **tuples, "prompt": prompt})
