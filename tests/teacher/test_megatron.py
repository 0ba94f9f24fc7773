"""The co-located teacher: exact hidden states at every layout, frozen, offloaded and back."""

import pytest
import torch

from megatron_opd import parallel as mesh
from megatron_opd.model import build_model, enter_head, forward
from megatron_opd.packing import pack
from megatron_opd.teacher.megatron import MegatronTeacher
from tests.distributed import run_ranks
from tests.tiny import VOCAB, make_rollouts, qwen3

SHAPES = [(3, 5), (7, 2), (4, 9), (2, 1)]


def _score(rank, layout, sp, offload):
    """Return what the last stage holds: hidden states, and whether the weights are there."""
    parallel = mesh.initialize(*layout, sequence_parallel=sp)
    model = build_model(qwen3(), parallel, dtype=torch.float32, seed=3, trainable=False)
    teacher = MegatronTeacher(model, parallel, vocab_size=VOCAB, offload=offload)
    multiple = parallel.tp if sp else 1
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=20, multiple=multiple)
    resting = [p.numel() for p in model.parameters()]
    first, again = teacher.score(batches), teacher.score(batches)
    for one, other in zip(first, again, strict=True):
        assert one is None or torch.equal(one.hidden_NH, other.hidden_NH)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(s.hidden_NH.requires_grad for s in first if s)
    return [s and s.hidden_NH for s in first], resting, [p.numel() for p in model.parameters()]


def _direct(rank):
    parallel = mesh.initialize()
    model = build_model(qwen3(), parallel, dtype=torch.float32, seed=3, trainable=False)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=20)
    return [enter_head(forward(model, batch), parallel)[batch.source_N] for batch in batches]


@pytest.mark.parametrize(
    "layout,sp", [((1, 1), False), ((2, 1), True), ((1, 2), False), ((2, 2), True)]
)
def test_hidden_states_of_the_supervised_positions(layout, sp):
    (expected,) = run_ranks(_direct, 1)
    assert len(expected) > 1
    for scores, _, _ in run_ranks(_score, layout[0] * layout[1], layout, sp, False)[-layout[0] :]:
        for hidden, direct in zip(scores, expected, strict=True):
            assert (hidden - direct).abs().max() < 1e-5


def test_offloaded_weights_leave_the_device_and_come_back():
    ((plain, _, _),) = run_ranks(_score, 1, (1, 1), False, False)
    ((scores, resting, after),) = run_ranks(_score, 1, (1, 1), False, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, scores, strict=True))
    assert resting == after and sorted(set(resting))[:1] == [0]
    assert sum(n > 0 for n in resting) == 1  # the head stays: the loss multiplies by it
