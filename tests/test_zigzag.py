"""Context parallelism's parts: nothing is lost, nothing is twice, and every rank has as much."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.packing import pack
from megatron_opd.zigzag import part_of, places
from tests.tiny import make_rollouts

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


def parts(shapes, size, multiple=1, fraction=0.5):
    """Return a pack of everything, and its parts."""
    how = dict(count=1, multiple=multiple, measure_fraction=fraction, cp=size)
    (whole,) = pack(make_rollouts(shapes, top=3), microbatch_tokens=1000, **how)
    return whole, [part_of(whole, size=size, rank=rank) for rank in range(size)]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([2, 3, 4]), st.sampled_from([1, 2, 4]))
def test_every_token_and_every_target_is_on_one_rank(shapes, size, multiple):
    whole, own = parts(shapes, size, multiple)
    assert {len(part.token_T) for part in own} == {len(whole.token_T) // size}
    assert len(own[0].token_T) % multiple == 0
    rank_T, place_T = places(whole.cu_seqlens, size)
    for name in ("token_T", "position_T"):
        together = torch.stack([getattr(part, name) for part in own])[rank_T, place_T]
        assert torch.equal(together, getattr(whole, name))
    index_N = torch.cat([part.part.index_N for part in own])
    for name in ("target_N", "mask_N", "position_N", "sequence_N", "group_N", "rollout_ids_NK"):
        together = torch.cat([getattr(part, name) for part in own])[index_N.argsort()]
        assert torch.equal(together, getattr(whole, name)), name


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([2, 3]))
def test_sources_and_measured_targets_are_the_same_tokens(shapes, size):
    whole, own = parts(shapes, size)
    measured = []
    for rank, part in enumerate(own):
        index_N = part.part.index_N
        rank_T, place_T = places(whole.cu_seqlens, size)
        assert torch.equal(rank_T[whole.source_N[index_N]], torch.full_like(index_N, rank))
        assert torch.equal(place_T[whole.source_N[index_N]], part.source_N)
        measured += index_N[part.measured_M].tolist()
        assert torch.equal(part.own(whole.target_N), part.target_N)
        assert part.whole is whole and part.part.leads == (rank == 0)
    assert sorted(measured) == whole.measured_M.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_causal_attention_costs_every_rank_the_same(size):
    _, own = parts([(20, 13), (5, 4)], size)
    assert len({int((part.position_T + 1).sum()) for part in own}) == 1


def test_one_rank_has_all():
    whole, (part,) = parts([(3, 4)], 1)
    assert part is whole and part.whole is whole
    assert torch.equal(part.gathered(part.target_N), whole.target_N)
