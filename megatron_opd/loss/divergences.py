"""Divergences: elementwise functions of two log-probabilities, and their slopes.

s = log p of the student, t = log q of the teacher, d = s − t. A divergence is Σ f(s, t) over the
entries that are compared; an estimator is f(s, t) at the one entry that was drawn from p. Each
function here returns (f, ∂f/∂s), both of the shape of s. Normalisation, sharding, masks and token
weights are not its business.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse_kl(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p‖q) = Σ p·d, mode seeking."""
    p = s.exp()
    value = (s - t).mul_(p)
    return value, p.add_(value)


def forward_kl(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q‖p) = −Σ q·d, mode covering."""
    q = t.exp()
    return (t - s).mul_(q), q.neg_()


def jsd(s: Tensor, t: Tensor, *, beta: float, rescale: bool) -> tuple[Tensor, Tensor]:
    """β KL(q‖m) + (1−β) KL(p‖m) with m = βq + (1−β)p: β weighs the teacher, as in GKD and TRL.

    It vanishes with β(1−β); divided by that (`rescale`), β → 0 is the forward KL, β → 1 the
    reverse.
    """
    if beta in (0.0, 1.0):  # only reached rescaled: the limits
        return forward_kl(s, t) if beta == 0.0 else reverse_kl(s, t)
    p, q, scale = s.exp(), t.exp(), 1 / (beta * (1 - beta)) if rescale else 1.0
    m = _log_mean(p, q, beta)
    slope = p.mul_(s - m).mul_((1 - beta) * scale)
    value = q.mul_(t - m).mul_(beta * scale)
    return value.add_(slope), slope


def skew_kl(s: Tensor, t: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q ‖ αq + (1−α)p), finite where the student has no mass (DistiLLM)."""
    q = t.exp()
    m = _log_mean(s.exp(), q, alpha)
    slope = (s - m).add_(math.log1p(-alpha)).exp_().mul_(q).neg_()
    return (t - m).mul_(q), slope


def _log_mean(p: Tensor, q: Tensor, teacher_share: float) -> Tensor:
    """Return log(α·q + (1−α)·p), where both underflow too: it then has a factor of 0."""
    mean = torch.lerp(p, q, teacher_share)
    return mean.clamp_(min=torch.finfo(mean.dtype).tiny).log_()


def k1(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """d: unbiased for KL(p‖q); as a function to descend it has no gradient on average."""
    d = s - t
    return d, torch.ones_like(d)


def k2(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """½d²: biased, but its gradient is on average that of KL(p‖q)."""
    d = s - t
    return d.square() / 2, d


def k3(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """e^−d − 1 + d ≥ 0: unbiased for KL(p‖q), while its gradient is on average that of KL(q‖p)."""
    d = s - t
    return (-d).expm1() + d, -(-d).expm1()


def cross_entropy(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of a given token; the teacher plays no part."""
    return -s, -torch.ones_like(s)


def nothing(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """0: what a token costs is its response's advantage, and the models say nothing of it."""
    return torch.zeros_like(s), torch.zeros_like(s)


def of_user(f: Callable[[Tensor, Tensor], Tensor], *, sloped: bool) -> Slope:
    """Return a user's f(s, t) together with ∂f/∂s by autograd; zero where that is not wanted.

    Raises:
        ValueError: f is not elementwise, or does not depend on s where its slope is wanted.
    """

    def value_and_slope(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if not sloped:
            return f(s, t), torch.zeros_like(s)
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            value = f(s, t.detach())
            (slope,) = torch.autograd.grad(value.sum(), s)
        return value.detach(), slope

    probe = torch.tensor([-1.0, -2.0])
    try:
        value, _ = value_and_slope(probe, probe.flip(0))
    except RuntimeError as error:
        raise ValueError(f"objective.divergence: {_name(f)}(s, t): {error}") from None
    if value.shape != probe.shape:
        raise ValueError(
            f"objective.divergence: {_name(f)}(s, t) of two tensors of shape [2] gave "
            f"{list(value.shape)}, expected one value per entry; leave sums to the support"
        )
    return value_and_slope


def _name(f: Callable) -> str:
    return getattr(f, "__name__", repr(f))


OVER_A_SET: dict[str, Callable] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
}
OF_ONE_DRAW: dict[str, Slope] = {"k1": k1, "k2": k2, "k3": k3}
