"""Drawing tokens: the distribution drawn from, its log-probabilities, counter-based randomness."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.rollout.sampling import (
    Sampling,
    draw,
    most_likely,
    request_seed,
    truncate,
    uniform,
)

MASK = (1 << 64) - 1


def _splitmix64(seed: int, position: int) -> float:
    """The published recurrence in Python integers."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


@given(st.integers(0, 2**63 - 1), st.integers(0, 40_000))
def test_uniform_is_splitmix64(seed, position):
    assert uniform(torch.tensor([seed]), position).item() == _splitmix64(seed, position)


def test_uniform_is_flat_and_independent_of_neighbours():
    seeds = torch.tensor([request_seed(0, 7, prompt, s) for prompt in range(500) for s in range(4)])
    u = torch.stack([uniform(seeds, position) for position in range(20)])
    counts = torch.histc(u.float(), 20, 0, 1)
    assert ((counts - 2000).abs() < 250).all()  # 40,000 draws in 20 bins: 5.7 standard deviations
    centred = u - 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() * 12 < 0.03  # along a response
    by_prompt = centred.view(20, 500, 4)
    assert (by_prompt[..., 0] * by_prompt[..., 1]).mean().abs() * 12 < 0.05  # within a group


def test_draws_follow_the_distribution_and_report_its_log_probabilities():
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)) * 2
    rows, seeds = logits.expand(20_000, 8), torch.arange(20_000)
    sampling = Sampling(max_tokens=1, temperature=0.7)
    ids, logp = draw(rows, uniform(seeds, 0), sampling)
    logp = logp.gather(1, ids[:, None])[:, 0]
    expected = (logits[0].double() / 0.7).softmax(-1)
    assert (torch.bincount(ids, minlength=8) / 20_000 - expected).abs().max() < 0.015
    assert torch.allclose(logp.double(), expected.log()[ids], atol=1e-6)


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, 5)
    edges = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    ids, _ = draw(logits, edges, Sampling(max_tokens=1))
    assert ids.tolist() == [1, 1, 3, 3]


def test_greedy_takes_the_largest_and_reports_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    ids, logp = draw(logits, torch.tensor([0.99], dtype=torch.float64), Sampling(1, temperature=0))
    assert ids.item() == 1 and torch.allclose(logp, logits.log_softmax(-1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.99), st.integers(0, 12))
def test_truncation_keeps_the_smallest_set_that_reaches_top_p(seed, top_p, top_k):
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = truncate(logits, top_p, top_k)[0].isfinite()
    allowed = logits[0].topk(min(top_k or 10, 10)).indices
    p = torch.zeros(10, dtype=torch.float64)
    p[allowed] = logits[0, allowed].softmax(-1)
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(0) < top_p).sum()) + 1
    assert sorted(kept.nonzero()[:, 0].tolist()) == sorted(order[:size].tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-3.0, -0.5, -0.0, 0.0, 1.5, float("-inf")]), min_size=4))
def test_the_most_likely_ids_come_best_first_and_lowest_first_among_equals(row):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([row, row[::-1]], dtype=dtype)
        expected = logits.sort(dim=-1, descending=True, stable=True).indices
        for k in (1, 3, len(row)):
            assert torch.equal(most_likely(logits, k), expected[:, :k])


def test_the_most_likely_ids_of_a_real_vocabulary():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 4
    for dtype in (torch.float32, torch.bfloat16):  # in bf16 hundreds are equal
        expected = logits.to(dtype).sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(most_likely(logits.to(dtype), 100), expected[:, :100])
