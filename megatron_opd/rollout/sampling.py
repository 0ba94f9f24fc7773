"""Draw tokens from logits: truncation, inverse-CDF sampling, counter-based randomness.

The random number of a token is a hash of (its request's seed, its position): it does not depend on
the batch the request is in, on the layout of ranks, or on any generator's state, so a resumed run
samples what the uninterrupted one would have.

Shape suffixes: B requests · V vocabulary · K ids.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to draw a response; `temperature=0` is greedy, `top_k=0` and `top_p=1` cut nothing."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    top_ids: int = 0  # this many most likely ids, and their logp, come back with every token


def request_seed(*parts: int) -> int:
    """Return a 63-bit seed of the integers `parts` (run seed, step, prompt index, sample)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed_B: Tensor, position: int) -> Tensor:
    """Return one float64 in [0, 1) per request: SplitMix64 of (seed, position)."""
    z = seed_B + _signed((position + 1) * 0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _signed(x: int) -> int:
    """Return the int64 with the low 64 bits of `x`; torch multiplies and adds modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right logically: torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def truncate(logits_BV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Set to -inf what top-k, then top-p (the smallest set reaching mass `top_p`), leave out."""
    if top_k:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.size(-1))).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        p_BV = sorted_BV.softmax(-1)
        before_BV = p_BV.cumsum(-1) - p_BV  # the mass ahead of each entry; the first always stays
        drop_BV = torch.zeros_like(order_BV, dtype=torch.bool)
        drop_BV.scatter_(1, order_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, -torch.inf)
    return logits_BV


def draw(logits_BV: Tensor, u_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the drawn ids [B] and the log-probabilities of the distribution drawn from, [B, V].

    Greedy decoding (`temperature=0`) reports log-probabilities at temperature 1.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        id_B = logits_BV.argmax(-1)
    else:
        logits_BV = truncate(logits_BV / sampling.temperature, sampling.top_p, sampling.top_k)
        # float64: an fp32 running sum over 150k entries would misplace rare tokens
        cdf_BV = logits_BV.softmax(-1).double().cumsum(-1)
        id_B = torch.searchsorted(cdf_BV, (u_B * cdf_BV[:, -1])[:, None], right=True)[:, 0]
    return id_B, logits_BV.log_softmax(-1)


def most_likely(logits_BV: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest logits, best first, [B, k]; the lowest id among equals.

    `topk` alone takes any of equals, and bf16 logits tie all the time: it is given integers that
    are ordered as (logit, −id), which no two entries share.
    """
    bits_BV = (logits_BV.float() + 0.0).view(torch.int32).long()  # + 0.0: -0.0 and 0.0 are equal
    # read as integers, floats are in order but for the negative ones, which are in reverse
    rank_BV = torch.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)
    last = logits_BV.size(-1) - 1
    key_BV = (rank_BV << 32) + torch.arange(last, -1, -1, device=logits_BV.device)
    return key_BV.topk(k).indices
