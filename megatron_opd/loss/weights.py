"""Per-token weights w_t: the loss is Σ w_t·D_t, and the weights of a config are multiplied.

A weight is a function to [N] factors. Its parameters say what it wants, by name: a property of
`View` (see there), or else an option that the config gives. A weight that takes `sequence_N` is
called once with a whole microbatch, every other one with the tokens of a chunk.

A correction is one more weight, of the ratio π/μ between trainer π and rollout engine μ, which are
never quite of one opinion about a token.

Shape suffix: N tokens, those of a sequence one after the other.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def teacher_entropy_gate(teacher_entropy_N: Tensor, *, threshold: float = 0.8) -> Tensor:
    """1 where the teacher is uncertain, H(q) > threshold in nats (EOPD)."""
    return (teacher_entropy_N > threshold).to(teacher_entropy_N.dtype)


def student_entropy_top(
    student_entropy_N: Tensor, sequence_N: Tensor, mask_N: Tensor, *, fraction: float = 0.5
) -> Tensor:
    """1 on the ⌈fraction·T⌉ tokens of a response where the student is most uncertain (REOPOLD)."""
    order_N = student_entropy_N.where(mask_N != 0, -torch.inf).argsort(descending=True, stable=True)
    order_N = order_N[sequence_N[order_N].argsort(stable=True)]  # by response, then by entropy
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device) - first_of(sequence_N)
    length_N = per_sequence_sum(mask_N.to(student_entropy_N.dtype), sequence_N)
    return (rank_N < (length_N * fraction).ceil()).to(student_entropy_N.dtype)


def position_decay(position_N: Tensor, *, half_life: float) -> Tensor:
    """2^(−position / half_life): early tokens decide what later ones are about."""
    return torch.exp2(-position_N.double() / half_life)


def prune_drift(
    overlap_N: Tensor,
    sequence_N: Tensor,
    *,
    threshold: float = 0.7,
    drop: float = 0.01,
    base: float = 0.5,
) -> Tensor:
    """clamp(1 − drop·#{t' ≤ t: overlap < threshold}, 0, 1) + base (Prune-OPD)."""
    drifted_N = (overlap_N < threshold).long().cumsum(0)
    before_N = torch.cat([drifted_N.new_zeros(1), drifted_N])[first_of(sequence_N)]
    return (1 - drop * (drifted_N - before_N).to(overlap_N.dtype)).clamp(0, 1) + base


def sod_step(
    student_logp_N: Tensor,
    teacher_logp_N: Tensor,
    position_N: Tensor,
    sequence_N: Tensor,
    mask_N: Tensor,
    *,
    step_tokens: int,
    delta: float = 0.2,
    eps: float = 1e-6,
) -> Tensor:
    """min((d_1 + ε) / (d_k + ε), 1 + δ) in the k-th step of a response, d its mean |log p − log q|.

    A step is a block of `step_tokens` tokens (SOD's is an agent's turn); w = 1 in the first.
    """
    step_N = (position_N % step_tokens == 0).long().cumsum(0) - 1
    mask_N = mask_N.to(student_logp_N.dtype)
    gap_N = (student_logp_N - teacher_logp_N).abs() * mask_N
    d_N = per_sequence_sum(gap_N, step_N) / per_sequence_sum(mask_N, step_N).clamp(min=1)
    weight_N = ((d_N[first_of(sequence_N)] + eps) / (d_N + eps)).clamp(max=1 + delta)
    return torch.where(position_N < step_tokens, 1.0, weight_N)


def correct_only(reward_N: Tensor, *, threshold: float = 0.5) -> Tensor:
    """1 in responses that are worth more than the threshold (KDRL's mask, SCOPE, SRPO)."""
    return (reward_N > threshold).to(reward_N.dtype)


def incorrect_only(reward_N: Tensor, *, threshold: float = 0.5) -> Tensor:
    """1 in the others."""
    return (reward_N <= threshold).to(reward_N.dtype)


def rlsd(
    student_logp_N: Tensor,
    teacher_logp_N: Tensor,
    advantage_N: Tensor,
    *,
    share: float = 0.5,
    eps: float = 0.2,
) -> Tensor:
    """1 − λ + λ·clip(exp(sign(A)·(log q − log p)), 1 − ε, 1 + ε) with λ = share (RLSD).

    Of divergence=outcome: praise and blame go where the teacher would have given them.
    """
    gap_N = advantage_N.sign() * (teacher_logp_N - student_logp_N)
    return 1 - share + share * gap_N.exp().clamp(1 - eps, 1 + eps)


def data_only(drawn_N: Tensor) -> Tensor:
    """1 in the dataset's responses (rollout.data_fraction)."""
    return 1 - drawn_N


def rollout_only(drawn_N: Tensor) -> Tensor:
    """1 in responses that the engine drew."""
    return drawn_N


def tis(log_ratio_N: Tensor, *, low: float, high: float) -> Tensor:
    """min(π/μ, high): truncated importance sampling, which knows no low."""
    return log_ratio_N.exp().clamp(max=high)


def icepop(log_ratio_N: Tensor, *, low: float, high: float) -> Tensor:
    """π/μ inside [low, high], else 0 (IcePop, MOPD)."""
    return torch.where(inside(log_ratio_N, low, high), log_ratio_N.exp(), 0.0)


def mask(log_ratio_N: Tensor, *, low: float, high: float) -> Tensor:
    """1 inside [low, high], else 0."""
    return inside(log_ratio_N, low, high).to(log_ratio_N.dtype)


def inside(log_ratio_N: Tensor, low: float, high: float) -> Tensor:
    """Return which ratios π/μ are in [low, high]; one that is no number is not."""
    ratio_N = log_ratio_N.exp()
    return (ratio_N >= low) & (ratio_N <= high)


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "teacher_entropy_gate": teacher_entropy_gate,
    "student_entropy_top": student_entropy_top,
    "position_decay": position_decay,
    "prune_drift": prune_drift,
    "sod_step": sod_step,
    "correct_only": correct_only,
    "incorrect_only": incorrect_only,
    "rlsd": rlsd,
    "data_only": data_only,
    "rollout_only": rollout_only,
}
CORRECTIONS: dict[str, Callable[..., Tensor]] = {"tis": tis, "icepop": icepop, "mask": mask}
FROM_THE_BATCH = (
    "position_N",
    "sequence_N",
    "mask_N",
    "rollout_logp_N",
    "drawn_N",
    "reward_N",
    "advantage_N",
)
FROM_THE_TEACHER = ("teacher_logp_N", "teacher_entropy_N", "overlap_N")
FROM_THE_MODELS = ("student_logp_N", "student_entropy_N", "log_ratio_N", *FROM_THE_TEACHER)


@dataclass(frozen=True)
class Weight:
    """A weight function, what it wants of the view, and its options."""

    name: str
    function: Callable[..., Tensor]
    wants: tuple[str, ...]
    options: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether it must see whole responses."""
        return "sequence_N" in self.wants

    @property
    def looks(self) -> bool:
        """Whether it needs the logits of a model."""
        return any(name in FROM_THE_MODELS for name in self.wants)

    def __call__(self, view: Any) -> Tensor:
        """Return w of the view's tokens, [N]."""
        return self.of(**{name: getattr(view, name) for name in self.wants})

    def of(self, **values: Tensor) -> Tensor:
        """Return w, given what it wants by name."""
        return self.function(**values, **self.options)


def bind(function: Callable[..., Tensor], options: Mapping[str, Any]) -> Weight:
    """Give a weight its options.

    Raises:
        ValueError: an option it does not have, or none where it needs one.
    """
    parameters = inspect.signature(function).parameters
    name = f"objective.weights.{function.__name__}"
    wants = tuple(p for p in parameters if p in FROM_THE_BATCH + FROM_THE_MODELS)
    known = [p for p in parameters if p not in wants]
    for option in options:
        if option not in known:
            raise ValueError(f"{name}: got '{option}', expected {', '.join(known) or 'no options'}")
    for option in known:
        if option not in options and parameters[option].default is inspect.Parameter.empty:
            raise ValueError(f"{name}: missing '{option}', which has no default; set it")
    if not wants:
        raise ValueError(
            f"{name}: has no parameter of "
            f"{', '.join(FROM_THE_BATCH + FROM_THE_MODELS)}; a weight depends on the token"
        )
    return Weight(function.__name__, function, wants, dict(options))


def first_of(group_N: Tensor) -> Tensor:
    """Return the index of the first token of each token's group; groups ascend."""
    return torch.searchsorted(group_N, group_N)


def per_sequence_sum(x_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Return at each token the sum of x over its sequence."""
    return torch.zeros_like(x_N).index_add_(0, sequence_N, x_N)[sequence_N]


def reward_to_go(x_N: Tensor, sequence_N: Tensor, discount: float) -> Tensor:
    """Return Σ_{t' ≥ t} γ^(t'−t) x_t' within the sequence, by doubling: log N passes."""
    total_N, reach = x_N.clone(), 1
    while reach < len(x_N):
        same_N = sequence_N[:-reach] == sequence_N[reach:]
        later_N = torch.where(same_N, total_N[reach:], 0.0)
        total_N = torch.cat([total_N[:-reach] + discount**reach * later_N, total_N[-reach:]])
        reach *= 2
    return total_N
