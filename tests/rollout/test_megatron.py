"""The embedded engine: log-probs, stops, limits, seeds and batching, at every layout."""

import pytest
import torch
from torch.nn.functional import log_softmax

from megatron_opd import parallel as mesh
from megatron_opd.model import build_model, forward, init_random
from megatron_opd.packing import pack
from megatron_opd.rollout import Sampling
from megatron_opd.rollout.megatron import MegatronEngine
from megatron_opd.types import Prompt, Rollout
from tests.distributed import run_ranks
from tests.rollout.student import training_logits
from tests.tiny import VOCAB, make_prompts, qwen3


def _model(parallel):
    model = build_model(qwen3(), parallel, dtype=torch.float32)
    init_random(model, seed=1)
    return model


def _engine(tp, pp, *, batch_size=4, **axes):
    parallel = mesh.initialize(tp, pp, **axes)
    model = _model(parallel)
    return MegatronEngine(model, parallel, vocab_size=VOCAB, batch_size=batch_size)


def _generate(rank, layout, sampling, kwargs):
    engine = _engine(*layout, **kwargs)
    prompts = make_prompts([5, 9, 3, 7, 5, 12])
    return engine.generate(prompts, n=2, sampling=sampling, seed=11)


def generate(layout, sampling, **kwargs):
    world = layout[0] * layout[1] * kwargs.get("cp", 1)
    ranks = run_ranks(_generate, world, layout, sampling, kwargs)
    assert all(rollouts == ranks[0] for rollouts in ranks)  # every rank of the replica knows all
    return ranks[0]


def _training_logits(rollouts):
    """Logits at every response token, one process; the batch."""
    parallel = mesh.initialize()
    return training_logits(_model(parallel), parallel, rollouts, VOCAB)


def _training_top(rank, rollouts, k):
    """The k most likely ids at every response token."""
    logits, batch = _training_logits(rollouts)
    return logits.topk(k).indices, batch.rollout_ids_NK


def _training_logp(rank, rollouts, temperature):
    """Log-probs of the rollouts' own tokens."""
    logits, batch = _training_logits(rollouts)
    logp = log_softmax(logits / temperature, -1)
    return logp.gather(1, batch.target_N[:, None])[:, 0], batch.rollout_logp_N


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_log_probs_equal_the_training_forward(layout):
    rollouts = generate(layout, Sampling(max_tokens=10, temperature=0.8, stop_ids=(4,)))
    (trained, reported), *_ = run_ranks(_training_logp, 1, rollouts, 0.8)
    assert (trained - reported).abs().max() < 1e-4
    assert reported.min() < -1.0  # not all near certain: the comparison means something


def test_tokens_are_the_same_at_every_layout_and_batch_size():
    sampling = Sampling(max_tokens=8, temperature=1.0)
    one = generate((1, 1), sampling, batch_size=64)
    for layout, kwargs in [
        ((1, 1), dict(batch_size=1)),
        ((2, 1), dict(batch_size=5)),
        ((2, 1), dict(sequence_parallel=True)),
        ((1, 2), {}),
        ((2, 2), dict(sequence_parallel=True)),
        ((1, 2), dict(vpp=2)),
        ((2, 1), dict(cp=2, sequence_parallel=True)),
    ]:
        other = generate(layout, sampling, **kwargs)
        assert [r.response_ids for r in other] == [r.response_ids for r in one]


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_most_likely_ids_are_the_training_forwards(layout):
    sampling = Sampling(max_tokens=10, temperature=0.7, top_k=2, stop_ids=(4,), top_ids=5)
    ranks = run_ranks(_generate, layout[0] * layout[1], layout, sampling, {})
    for rollouts in ranks:
        for r, first in zip(rollouts, ranks[0], strict=True):
            assert r.top_ids.shape == (len(r.response_ids), 5) and r.top_ids.dtype == "int32"
            assert (r.top_ids == first.top_ids).all()
            # truncation is of the draw alone: five ids are told though two could be drawn
            assert all(
                token in top[:2] for token, top in zip(r.response_ids, r.top_ids, strict=True)
            )
    ((trained, reported), *_) = run_ranks(_training_top, 1, ranks[0], 5)
    assert torch.equal(trained, reported)
    assert all(r.top_ids is None for r in generate(layout, Sampling(max_tokens=2)))


def test_stops_limits_and_padding():
    sampling = Sampling(max_tokens=30, temperature=1.5, stop_ids=(3, 4))
    rollouts = generate((2, 1), sampling)
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        stops = [token in sampling.stop_ids for token in r.response_ids]
        assert (r.finish == "stop") == stops[-1] and not any(stops[:-1])
        assert len(r.response_ids) == 30 or r.finish == "stop"
        assert len(r.logp) == len(r.response_ids) and max(r.response_ids) < VOCAB
    assert [(r.prompt.index, r.sample) for r in rollouts] == [
        (i, s) for i in range(6) for s in (0, 1)
    ]


def _draw_twice(rank):
    engine = _engine(1, 1)
    prompts, sampling = make_prompts([4, 6]), Sampling(max_tokens=12)
    before = torch.get_rng_state()
    first = engine.generate(prompts, n=3, sampling=sampling, seed=5)
    again = engine.generate(prompts[::-1], n=3, sampling=sampling, seed=5)
    other = engine.generate(prompts, n=3, sampling=sampling, seed=6)
    return first, again, other, torch.equal(before, torch.get_rng_state()), engine.model.training


def test_draws_depend_on_seed_prompt_and_sample_alone():
    ((first, again, other, untouched, training),) = run_ranks(_draw_twice, 1)
    assert [r.response_ids for r in again[3:] + again[:3]] == [r.response_ids for r in first]
    assert all(a.response_ids != b.response_ids for a, b in zip(first, other, strict=True))
    assert len({r.response_ids for r in first}) == 6  # the samples of a group differ
    assert untouched and training  # neither the global generator nor the model's mode has changed


def _greedy(rank):
    engine = _engine(1, 1)
    (rollout,) = engine.generate(
        make_prompts([6]), n=1, sampling=Sampling(5, temperature=0), seed=0
    )
    tokens = list(rollout.prompt.token_ids)
    for _ in range(5):  # no cache, one full forward a token
        (batch,) = pack([_as_rollout(tokens)], microbatch_tokens=100)
        hidden = forward(engine.model, batch)[-1, 0]
        logits = hidden @ engine.model.head(VOCAB).weight_VH.T
        tokens.append(int(logits[:VOCAB].argmax()))
    return rollout.response_ids, tuple(tokens[6:])


def _as_rollout(tokens):
    return Rollout(Prompt(0, tuple(tokens), ""), 0, (0,), (0.0,), "stop")


def test_greedy_equals_full_forwards_without_a_cache():
    ((cached, full),) = run_ranks(_greedy, 1)
    assert cached == full
