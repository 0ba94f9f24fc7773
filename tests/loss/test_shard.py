"""`VocabShard` on random shapes, and that its answers do not depend on the number of ranks."""

from functools import partial

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.loss import VocabShard
from tests.distributed import run_ranks


def ask(rank, logits_MCV, vocab_size, world, width, k, ids_CK):
    """Return what one rank answers about padded logits; padding is larger than anything real."""
    padded = torch.full((*logits_MCV.shape[:2], world * width), 1e30, dtype=logits_MCV.dtype)
    padded[..., :vocab_size] = logits_MCV
    group = dist.group.WORLD if world > 1 else None
    local = padded[..., rank * width : (rank + 1) * width].clone()
    shard = VocabShard(local, vocab_size, group)
    return {
        "top": shard.top(k),
        "at": shard.at(ids_CK),
        "entropy": shard.entropy(),
        "logsumexp": shard.logsumexp(shard.logp_MCV * 2),
        "columns": shard.logp_MCV,
    }


def answers(world, logits_MCV, width, k, ids_CK):
    args = (logits_MCV, logits_MCV.shape[-1], world, width, k, ids_CK)
    ranks = run_ranks(ask, world, *args) if world > 1 else [ask(0, *args)]
    for name in ("top", "at", "entropy", "logsumexp"):
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:]), name
    return ranks[0] | {"columns": torch.cat([rank["columns"] for rank in ranks], -1)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    world=st.sampled_from([1, 2, 3, 4]),
    vocab_size=st.integers(1, 40),
    spare=st.integers(0, 6),
    models=st.integers(1, 2),
    tokens=st.integers(1, 5),
    levels=st.sampled_from([1, 2, 5, 1000]),
    data=st.data(),
)
def test_answers_are_those_of_the_whole_rows(
    world, vocab_size, spare, models, tokens, levels, data
):
    width = -(-vocab_size // world) + spare  # `spare` may leave ranks with padding alone
    k = data.draw(st.integers(1, vocab_size))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # few levels: ties everywhere
    logits = torch.randint(levels, (models, tokens, vocab_size), generator=g).double() * 7 / levels
    ids = torch.randint(vocab_size, (tokens, 3), generator=g)
    got = answers(world, logits, width, k, ids)

    logp = logits.log_softmax(-1)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    close(got["columns"], logp)
    close(got["at"], logp.gather(-1, ids.expand(models, -1, -1)))
    close(got["entropy"], -(logp.exp() * logp).sum(-1))
    close(got["logsumexp"], (2 * logp).logsumexp(-1))
    for model in range(models):
        for token in range(tokens):
            row = logits[model, token].tolist()
            want = sorted(range(vocab_size), key=lambda v: (-row[v], v))[:k]
            assert got["top"][model, token].tolist() == want


def test_tied_bf16_logits_have_the_same_top_on_every_number_of_ranks():
    """bf16 has few numbers: the 16th best of 2000 logits often has an equal that must stay out."""
    logits = torch.randn(2, 40, 2000, generator=torch.Generator().manual_seed(0))
    logits = logits.bfloat16().float()
    edge = logits.topk(16).values[..., -1:]
    assert ((logits == edge).sum(-1) > 1).float().mean() > 0.2, "the test has lost its ties"
    ids = torch.zeros(40, 1, dtype=torch.int64)
    one, two, four = (answers(world, logits, 2048 // world, 16, ids)["top"] for world in (1, 2, 4))
    assert torch.equal(one, two) and torch.equal(one, four)
    assert torch.equal(one, logits.sort(dim=-1, descending=True, stable=True).indices[..., :16])


def test_ids_outside_the_vocabulary_have_no_probability():
    logits = torch.zeros(1, 1, 8)
    ids = torch.tensor([[-1, 0, 5, 6, 7, 8]])  # 6 entries, two columns of padding
    (row,) = VocabShard(logits, 6).at(ids)[0]
    assert row.isnan().tolist() == [True, False, False, True, True, True]


def test_huge_logits_keep_their_precision():
    """Softmax arithmetic subtracts the maximum of all ranks first."""
    logits = torch.tensor([[[1e4, 1e4 - 1, -1e4, 1e4 - 2]]], dtype=torch.float64)
    ids = torch.arange(4)[None]
    want = (logits - 1e4).log_softmax(-1)
    for world in (1, 2):
        got = answers(world, logits, 4 // world, 2, ids)["at"]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
