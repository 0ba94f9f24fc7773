"""The co-located teacher: exact scores at every layout, frozen, offloaded and back."""

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


def _summaries(rank, layout, sp, payload):
    """Return what the last stage hands over, of a teacher whose weights rest elsewhere."""
    parallel = mesh.initialize(*layout, sequence_parallel=sp)
    model = build_model(qwen3(), parallel, dtype=torch.float32, seed=3, trainable=False)
    how = dict(offload=True, payload=payload, k=6, temperature=0.7, chunk_tokens=4)
    teacher = MegatronTeacher(model, parallel, vocab_size=VOCAB, **how)
    multiple = parallel.tp if sp else 1
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=20, multiple=multiple)
    scores = teacher.score(batches)
    assert {p.numel() for p in model.parameters()} == {0}  # the head too: nobody needs it now
    return scores


def _distributions(rank):
    """Return log-probabilities over the vocabulary, and the targets, of every microbatch."""
    parallel = mesh.initialize()
    model = build_model(qwen3(), parallel, dtype=torch.float32, seed=3, trainable=False)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=20)
    hidden = [enter_head(forward(model, batch), parallel)[batch.source_N] for batch in batches]
    logits = [h.double() @ model.head(VOCAB).weight_VH.double().T / 0.7 for h in hidden]
    return [x[:, :VOCAB].log_softmax(-1) for x in logits], [batch.target_N for batch in batches]


@pytest.mark.parametrize(
    "layout,sp", [((1, 1), False), ((2, 1), True), ((1, 2), False), ((2, 2), True)]
)
@pytest.mark.parametrize("payload", ["topk", "sampled"])
def test_log_probabilities_instead_of_hidden_states(payload, layout, sp):
    ((distributions, targets),) = run_ranks(_distributions, 1)
    ranks = run_ranks(_summaries, layout[0] * layout[1], layout, sp, payload)
    assert all(one is None for scores in ranks[: -layout[0]] for one in scores)
    for scores in ranks[-layout[0] :]:
        for one, logp_NV, target_N in zip(scores, distributions, targets, strict=True):
            assert one.temperature == 0.7
            if payload == "topk":
                top = logp_NV.sort(dim=-1, descending=True, stable=True)
                assert torch.equal(one.ids_NK, top.indices[:, :6])
                assert (one.logp_NK - top.values[:, :6]).abs().max() < 1e-5
            else:
                expected = logp_NV.gather(1, target_N[:, None])[:, 0]
                assert (one.logp_N - expected).abs().max() < 1e-5


def test_offloaded_weights_leave_the_device_and_come_back():
    ((plain, _, _),) = run_ranks(_score, 1, (1, 1), False, False)
    ((scores, resting, after),) = run_ranks(_score, 1, (1, 1), False, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, scores, strict=True))
    assert resting == after and sorted(set(resting))[:1] == [0]
    assert sum(n > 0 for n in resting) == 1  # the head stays: the loss multiplies by it
