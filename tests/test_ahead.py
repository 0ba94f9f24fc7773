"""Responses that are not trained on yet survive a checkpoint, at any number of replicas."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_opd import ahead
from megatron_opd import parallel as mesh
from megatron_opd.ahead import Ahead, key
from tests.distributed import run_ranks
from tests.tiny import make_rollouts

SHAPES = [(3, 4), (5, 2), (2, 6), (4, 3)]


def _written(top):
    """Two responses to each of four prompts, two of which are one, whose indices are no places."""
    rollouts, made = [], make_rollouts(SHAPES, top=top)
    for place, one in enumerate(made):
        known = min(place, 2)
        prompt = replace(made[known].prompt, index=17 - 5 * known, copy=place - known)
        top_logp = None if one.top_ids is None else -one.top_ids.astype(np.float32) / 7
        rollouts += [
            replace(one, prompt=prompt, sample=sample, top_logp=top_logp, version=3, masked=sample)
            for sample in range(2)
        ]
    return rollouts


def _keep(rank, top):
    parallel = mesh.initialize()
    rollouts = _written(top)
    prompts = tuple(dict.fromkeys(key(r.prompt) for r in rollouts))
    own = _share(prompts[parallel.dp_rank :: parallel.dp], rollouts)
    return json.loads(json.dumps(Ahead(5, prompts, own).state_dict(parallel)))


def _share(prompts, rollouts):
    return [r for one in prompts for r in rollouts if key(r.prompt) == one]


def _restore(rank, state, top):
    parallel = mesh.initialize()
    # the stream knows a prompt once
    return ahead.load(state, {replace(r.prompt, copy=0) for r in _written(top)}, parallel)


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_what_was_kept_is_shared_out_again(top, before, after):
    states = run_ranks(_keep, before, top)
    assert all(state == states[0] for state in states)
    rollouts = _written(top)
    for rank, found in enumerate(run_ranks(_restore, after, states[0], top)):
        mine = _share(found.prompts[rank::after], rollouts)
        assert found.updates == 5 and found.rollouts == mine
        for one, other in zip(found.rollouts, mine, strict=True):
            for name in ("top_ids", "top_logp"):
                kept, want = getattr(one, name), getattr(other, name)
                assert (kept is want is None) or (
                    np.array_equal(kept, want) and kept.dtype == want.dtype
                )


def test_a_round_is_split_by_prompts_and_not_by_responses():
    rollouts = _written(0)[:-1]  # one response to the last prompt
    keys = tuple(dict.fromkeys(key(r.prompt) for r in rollouts))
    now, rest = Ahead(5, keys, rollouts).split(1)
    assert now == rollouts[:2] and rest is not None and rest.updates == 5
    now, last = rest.split(2)
    assert now == rollouts[2:6] and last is not None
    assert last.split(1) == (rollouts[6:], None)
