"""Responses that were written ahead survive a checkpoint, at any number of replicas."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_opd import ahead
from megatron_opd import parallel as mesh
from megatron_opd.ahead import Ahead
from tests.distributed import run_ranks
from tests.tiny import make_rollouts

SHAPES = [(3, 4), (5, 2), (2, 6), (4, 3)]


def _written(top):
    """Two responses to each of four prompts, whose indices are not their places."""
    rollouts = []
    for place, one in enumerate(make_rollouts(SHAPES, top=top)):
        prompt = replace(one.prompt, index=17 - 5 * place)
        top_logp = None if one.top_ids is None else -one.top_ids.astype(np.float32) / 7
        rollouts += [
            replace(one, prompt=prompt, sample=sample, top_logp=top_logp, version=3, masked=sample)
            for sample in range(2)
        ]
    return rollouts


def _keep(rank, top):
    parallel = mesh.initialize()
    rollouts = _written(top)
    prompts = tuple(dict.fromkeys(r.prompt.index for r in rollouts))
    mine = prompts[parallel.dp_rank :: parallel.dp]
    own = [r for index in mine for r in rollouts if r.prompt.index == index]
    return json.loads(json.dumps(Ahead(5, prompts, own).state_dict(parallel)))


def _restore(rank, state, top):
    parallel = mesh.initialize()
    return ahead.load(state, {r.prompt for r in _written(top)}, parallel)


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_what_was_kept_is_shared_out_again(top, before, after):
    states = run_ranks(_keep, before, top)
    assert all(state == states[0] for state in states)
    rollouts = _written(top)
    for rank, found in enumerate(run_ranks(_restore, after, states[0], top)):
        prompts = found.prompts[rank::after]
        mine = [r for index in prompts for r in rollouts if r.prompt.index == index]
        assert found.updates == 5 and found.rollouts == mine
        for one, other in zip(found.rollouts, mine, strict=True):
            for name in ("top_ids", "top_logp"):
                kept, want = getattr(one, name), getattr(other, name)
                assert (kept is want is None) or (
                    np.array_equal(kept, want) and kept.dtype == want.dtype
                )
