"""Shards of logits on random shapes, and that what ranks say together is what one rank says."""

from functools import partial

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.loss.shard import Projector, Ranks
from megatron_opd.types import Head
from tests.distributed import run_ranks

close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def shard_of(logits_CV, rank=0, world=1, width=None, **options):
    """Return one rank's shard of padded logits, which are the head of one-hot hidden states."""
    tokens, vocab_size = logits_CV.shape
    width = width or -(-vocab_size // world)
    rows = torch.full((world * width, tokens), 1e30, dtype=logits_CV.dtype)
    rows[:vocab_size] = logits_CV.T
    group = dist.group.WORLD if world > 1 else None
    head = Head(rows[rank * width : (rank + 1) * width], vocab_size, group, **options)
    hidden_CH = torch.eye(tokens, dtype=logits_CV.dtype)
    return Projector(hidden_CH, head, 1.0).shard(slice(None)), Ranks(group)


def ask(rank, logits_CV, world, width, k, ids_CK):
    """Return what one rank knows after all have spoken."""
    shard, ranks = shard_of(logits_CV, rank, world, width)
    sparse = ranks.logsumexp(shard.at(ids_CK))
    lse_C = ranks.logsumexp(shard.logsumexp())
    (top_CK,) = ranks.top(shard, k=k)
    dense = ranks.logsumexp(shard.at(ids_CK))
    shard.remove(top_CK, torch.arange(k) % 2 == 0)
    return {
        "sparse": sparse,
        "dense": dense,
        "logsumexp": lse_C,
        "top": top_CK,
        "rest": ranks.logsumexp(shard.logsumexp()),
    }


def answers(world, *args):
    ranks = (
        run_ranks(ask, world, args[0], world, *args[1:])
        if world > 1
        else [ask(0, args[0], 1, *args[1:])]
    )
    for name in ranks[0]:
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:]), name
    return ranks[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    world=st.sampled_from([1, 2, 3, 4]),
    vocab_size=st.integers(1, 40),
    spare=st.integers(0, 6),
    tokens=st.integers(1, 5),
    levels=st.sampled_from([1, 2, 5, 1000]),
    data=st.data(),
)
def test_answers_are_those_of_the_whole_rows(world, vocab_size, spare, tokens, levels, data):
    width = -(-vocab_size // world) + spare  # `spare` may leave ranks with padding alone
    k = data.draw(st.integers(1, vocab_size))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # few levels: ties everywhere
    logits = torch.randint(levels, (tokens, vocab_size), generator=g).double() * 7 / levels
    ids = torch.randint(vocab_size, (tokens, 3), generator=g)
    got = answers(world, logits, width, k, ids)

    close(got["sparse"], logits.gather(-1, ids))
    close(got["dense"], logits.gather(-1, ids))
    close(got["logsumexp"], logits.logsumexp(-1))
    for token in range(tokens):
        row = logits[token].tolist()
        want = sorted(range(vocab_size), key=lambda v: (-row[v], v))[:k]
        assert got["top"][token].tolist() == want
        left = [row[v] for v in range(vocab_size) if v not in want[::2]]
        close(got["rest"][token], torch.tensor(left, dtype=torch.float64).logsumexp(0))


def test_tied_bf16_logits_have_the_same_top_on_every_number_of_ranks():
    """bf16 has few numbers: the 16th best of 8000 logits often has an equal that must stay out."""
    logits = torch.randn(40, 8000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    edge = logits.topk(16).values[..., -1:]
    assert ((logits == edge).sum(-1) > 1).float().mean() > 0.2, "the test has lost its ties"
    ids = torch.zeros(40, 1, dtype=torch.int64)
    one, two, four = (answers(world, logits, 8192 // world, 16, ids)["top"] for world in (1, 2, 4))
    assert torch.equal(one, two) and torch.equal(one, four)
    assert torch.equal(one, logits.sort(dim=-1, descending=True, stable=True).indices[..., :16])


def test_ids_outside_the_vocabulary_have_no_probability():
    shard, _ = shard_of(torch.zeros(1, 6), width=8)
    ids = torch.tensor([[-1, 0, 5, 6, 7, 8]])  # 6 entries, two columns of padding
    for _ in range(2):  # by dot products, then from dense logits
        assert shard.at(ids)[0].isinf().tolist() == [True, False, False, True, True, True]
        assert shard.z_CV.shape == (1, 6)


def test_huge_logits_keep_their_precision():
    """Softmax arithmetic subtracts the maximum of all ranks first."""
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4, 1e4 - 2]], dtype=torch.float64)
    for world in (1, 2):
        got = answers(world, logits, 4 // world, 2, torch.arange(4)[None])
        close(got["dense"] - got["logsumexp"][:, None], (logits - 1e4).log_softmax(-1), atol=1e-11)


def test_soft_cap_and_its_slope():
    """z = c·tanh(x/c)/T, by autograd."""
    x = torch.tensor([[-40.0, 0.5, 3.0, 25.0]], dtype=torch.float64, requires_grad=True)
    want = 10 * torch.tanh(x / 10) / 0.7
    (slope,) = torch.autograd.grad(want.sum(), x)
    head = Head(x.detach().T, 4, softcap=10.0)
    projector = Projector(torch.ones(1, 1, dtype=torch.float64), head, 0.7)
    z = projector.shard(slice(None)).z_CV
    close(z, want.detach())
    close(projector.slope(z), slope)
