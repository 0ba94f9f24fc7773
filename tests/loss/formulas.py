"""The contract of `Objective`, literally: one token's support, divergence and costs; and weights.

Plain Python on whole distributions, written to be compared with the paper and differentiated by
autograd, not to be fast. `dense` puts it together; `o` is an `Objective`, of which only the fields
are read.

Shape suffixes: V the vocabulary of one token · S its support, and behind it the tail · N tokens.
"""

import inspect
import math

import torch
from torch import Tensor


def best(logp_V: Tensor, k: int) -> list[int]:
    """Return the k most probable ids, lowest id first among equals."""
    values = logp_V.detach().tolist()
    return sorted(range(len(values)), key=lambda v: (-values[v], v))[:k]


def support(o, s_V: Tensor, t_V: Tensor, y: int, rollout_ids: list[int]) -> list[int]:
    """Return S."""
    mine, theirs = best(s_V, o.k), best(t_V, o.k)
    if callable(o.support):
        known = dict(
            student_ids_CK=mine, teacher_ids_CK=theirs, rollout_ids_CK=rollout_ids, target_C=y
        )
        wanted = inspect.signature(o.support).parameters
        ids_1K, valid_1K = o.support(**{name: torch.tensor([known[name]]) for name in wanted})
        ids = ids_1K[valid_1K].tolist()
    else:
        ids = {
            "sampled": [y],
            "student_topk": mine,
            "teacher_topk": theirs,
            "rollout_topk": rollout_ids,
            "intersection": [v for v in mine if v in theirs],
            "union": mine + [v for v in theirs if v not in mine],
            "union-intersection": sorted(set(mine) ^ set(theirs)),
            "full": list(range(len(s_V))),
        }[o.support]
    return [*ids, y] if o.append_sampled and y not in ids else ids


def categories(o, s_V: Tensor, t_V: Tensor, b_V: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return s and the target t' on what D is a sum over: S, and the tail behind it."""
    target_V = o.extrapolation * t_V + (1 - o.extrapolation) * b_V + o.veto * s_V.detach()
    if o.support == "sampled":
        return s_V[ids], target_V[ids]
    if o.support != "full" and o.normalize == "support":
        return s_V[ids].log_softmax(-1), target_V[ids].log_softmax(-1)
    target_V = target_V.log_softmax(-1)
    rest = [v for v in range(len(s_V)) if v not in ids]
    if not o.tail or not rest:
        return s_V[ids], target_V[ids]
    s_S, t_S = (torch.cat([x[ids], x[rest].logsumexp(-1, keepdim=True)]) for x in (s_V, target_V))
    return s_S, t_S


def integrand(o, s: Tensor, t: Tensor) -> Tensor:
    """Return f(s, t): what the direct form sums over a set."""
    if callable(o.divergence):
        return o.divergence(s, t)
    p, q, a, b = s.exp(), t.exp(), o.skew_alpha, o.jsd_beta
    reverse, forward = p * (s - t), q * (t - s)
    if o.divergence == "reverse_kl":
        return reverse
    if o.divergence == "forward_kl":
        return forward
    if o.divergence == "skew_kl":
        return q * (t - (a * q + (1 - a) * p).log())
    if o.jsd_rescale and b in (0, 1):
        return reverse if b else forward
    m = (b * q + (1 - b) * p).log()
    return (b * q * (t - m) + (1 - b) * p * (s - m)) / (b * (1 - b) if o.jsd_rescale else 1)


def cost(o, s: Tensor, t: Tensor) -> Tensor:
    """Return what one drawn entry says of D: the negative reward of the policy gradient."""
    if callable(o.divergence):
        return o.divergence(s, t)
    if o.divergence == "outcome":
        return 0 * s
    d = s - t
    if o.support != "sampled" or o.estimator == "k1":
        return d
    return d**2 / 2 if o.estimator == "k2" else (-d).exp() - 1 + d


def direct(o, s_S: Tensor, t_S: Tensor, ids: list[int]) -> Tensor:
    """Return D; that of an empty set is 0, whatever a user's function says of its tail."""
    if not ids:
        return 0 * s_S.sum()
    return (cost if o.support == "sampled" else integrand)(o, s_S, t_S).sum()


def baseline(o, s_V: Tensor, t_V: Tensor) -> Tensor | float:
    """Return the baseline a token has of its own."""
    if o.baseline == "topk_kl":
        ids = best(s_V, o.k)
        s_V, t_V = s_V[ids].log_softmax(-1), t_V[ids].log_softmax(-1)
    return (s_V.exp() * (s_V - t_V)).sum() if o.baseline in ("kl", "topk_kl") else 0.0


def outcome(o) -> float:
    """Return what the response's advantage counts."""
    return 1.0 if o.divergence == "outcome" else o.outcome


def ppo(o, ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return −min(ρA, clip(ρ)·A), and where A < 0 with a dual clip −max(min(…), c·A)."""
    low = 0.0 if o.clip_low is None else 1 - o.clip_low
    high = math.inf if o.clip_high is None else 1 + o.clip_high
    gain = torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    if o.dual_clip is not None and advantage < 0:
        gain = torch.max(gain, o.dual_clip * advantage)
    return -gain


def reward_weights(o, s_S: Tensor, t_S: Tensor) -> Tensor:
    """Return w of the policy gradient."""
    if o.support == "sampled":
        return torch.ones_like(s_S)
    if o.reward_weight == "none":
        return torch.ones_like(s_S) / (len(s_S) if o.reward_weight_normalize else 1)
    x_S = s_S if o.reward_weight == "student_p" else t_S
    return x_S.softmax(-1) if o.reward_weight_normalize else x_S.exp()


# Per-token weights


def teacher_entropy_gate(teacher_entropy_N, threshold=0.8):
    return (teacher_entropy_N > threshold).double()


def student_entropy_top(student_entropy_N, sequence_N, mask_N, fraction=0.5):
    keep_N = torch.zeros_like(student_entropy_N)
    for sequence in sequence_N.unique():
        rows = [i for i, s in enumerate(sequence_N) if s == sequence and mask_N[i]]
        rows.sort(key=lambda i: -float(student_entropy_N[i]))
        keep_N[rows[: math.ceil(fraction * len(rows))]] = 1.0
    return keep_N


def position_decay(position_N, half_life):
    return 0.5 ** (position_N.double() / half_life)


def prune_drift(overlap_N, position_N, sequence_N, threshold=0.7, drop=0.01, base=0.5):
    bad = []
    for i in range(len(overlap_N)):
        before = (sequence_N == sequence_N[i]) & (position_N <= position_N[i])
        bad.append(int((overlap_N[before] < threshold).sum()))
    return (1 - drop * torch.tensor(bad).double()).clamp(0, 1) + base


def sod_step(
    student_logp_N, teacher_logp_N, position_N, sequence_N, mask_N, step_tokens, delta=0.2, eps=1e-6
):
    gap_N, step_N = (student_logp_N - teacher_logp_N).abs(), position_N // step_tokens
    weight_N = torch.ones_like(gap_N)
    for i in range(len(gap_N)):
        inside = (sequence_N == sequence_N[i]) & (mask_N != 0)
        if step_N[i] > 0 and mask_N[i]:
            first, here = (gap_N[inside & (step_N == k)].mean() for k in (0, step_N[i]))
            weight_N[i] = min((first + eps) / (here + eps), torch.tensor(1 + delta))
    return weight_N


def rlsd(student_logp_N, teacher_logp_N, advantage_N, share=0.5, eps=0.2):
    weight_N = torch.ones_like(student_logp_N)
    for i, a in enumerate(advantage_N):
        ratio = math.exp(teacher_logp_N[i] - student_logp_N[i])
        likely = ratio if a > 0 else 1 / ratio
        weight_N[i] = (1 - share) + share * min(max(likely, 1 - eps), 1 + eps)
    return weight_N


def corrected(o, ratio: float) -> bool:
    """Say whether the correction acts on a token."""
    low = ratio < o.correction_low and o.correction != "tis"
    return o.correction != "none" and (low or ratio > o.correction_high)


def correction(o, ratio: float) -> float:
    """Return the weight by trainer and engine."""
    if o.correction == "tis":
        return min(ratio, o.correction_high)
    kept = {"none": 1.0, "icepop": ratio, "mask": 1.0}[o.correction]
    return 0.0 if corrected(o, ratio) else kept


WEIGHTS = dict(
    teacher_entropy_gate=teacher_entropy_gate,
    student_entropy_top=student_entropy_top,
    position_decay=position_decay,
    prune_drift=prune_drift,
    sod_step=sod_step,
    correct_only=lambda reward_N, threshold=0.5: (reward_N > threshold).double(),
    incorrect_only=lambda reward_N, threshold=0.5: (reward_N <= threshold).double(),
    rlsd=rlsd,
    data_only=lambda drawn_N: (drawn_N == 0).double(),
    rollout_only=lambda drawn_N: (drawn_N != 0).double(),
)
