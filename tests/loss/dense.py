"""An independent reference: all logits at once, float64, autograd on the literal formulas."""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.loss import Objective
from megatron_opd.types import Head, HiddenScores, Microbatch


@dataclass(frozen=True)
class Problem:
    """A student and a teacher of another width on N tokens, without padding and without ranks."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, H_teacher]
    teacher_weight: Tensor  # [V, H_teacher]
    target: Tensor  # [N]
    token_weight: Tensor  # [N]
    rollout_logp: Tensor  # [N]

    def to(self, dtype: torch.dtype) -> "Problem":
        names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def make_problem(seed: int = 0, n: int = 7, v: int = 13, h: int = 5, h_teacher: int = 3) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = torch.rand(n, generator=g, dtype=torch.float64) + 0.5
    weights[n // 2] = 0.0
    return Problem(
        hidden=normal(n, h),
        weight=normal(v, h),
        teacher_hidden=normal(n, h_teacher),
        teacher_weight=normal(v, h_teacher),
        target=torch.randint(v, (n,), generator=g),
        token_weight=weights,
        rollout_logp=normal(n) - 3.0,
    )


class _Enter(torch.autograd.Function):
    """Identity whose backward sums over the ranks: what the caller of the loss provides."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        if ctx.group is not None:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def rows_of(weight: Tensor, rank: int, width: int, junk: float) -> Tensor:
    """Return one rank's `width` rows of a head; the padding beyond its real rows is junk."""
    rows = torch.full((width, weight.shape[1]), junk, dtype=weight.dtype)
    real = weight[rank * width : (rank + 1) * width]
    rows[: len(real)] = real
    return rows


def batch_of(problem: Problem) -> Microbatch:
    """Return the microbatch of these targets; the packed sequence behind it plays no part."""
    unused = torch.empty(0, dtype=torch.int64)
    return Microbatch(
        token_T=unused,
        position_T=unused,
        cu_seqlens=unused,
        max_seqlen=0,
        source_N=unused,
        target_N=problem.target,
        weight_N=problem.token_weight,
        rollout_logp_N=problem.rollout_logp,
    )


def judge(
    problem: Problem,
    objective: Objective,
    *,
    rank: int = 0,
    width: int | None = None,
    group=None,
    junk: tuple[float, float] = (1e4, -3e4),
    upstream: float = 1.0,
) -> dict:
    """Run the code under test on one rank: loss, metrics, gradients of hidden states and head."""
    vocab_size = len(problem.weight)
    width = width or vocab_size
    hidden = problem.hidden.clone().requires_grad_()
    weight = rows_of(problem.weight, rank, width, junk[0]).requires_grad_()
    teacher = HiddenScores(
        problem.teacher_hidden,
        Head(rows_of(problem.teacher_weight, rank, width, junk[1]), vocab_size, group),
    )
    loss, sums, maxima = objective(
        _Enter.apply(hidden, group),
        Head(weight, vocab_size, group),
        batch_of(problem),
        teacher if objective.divergence != "cross_entropy" else None,
    )
    (loss * upstream).backward()
    return {
        "loss": loss.detach(),
        "sums": sums,
        "maxima": maxima,
        "hidden": hidden.grad,
        "weight": weight.grad,
    }


def reference(problem: Problem, objective: Objective) -> dict:
    """Compute what `judge` should return, by the formulas and nothing else."""
    problem = problem.to(torch.float64)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    z = hidden @ weight.T
    logp = torch.log_softmax(z / objective.student_temperature, -1)
    logq = torch.log_softmax(
        problem.teacher_hidden @ problem.teacher_weight.T / objective.teacher_temperature, -1
    )
    y = torch.arange(len(z)), problem.target
    match objective.support, objective.divergence:
        case "sampled", "cross_entropy":
            value = surrogate = -logp[y]
        case "sampled", "reverse_kl":
            value = logp[y] - logq[y]
            surrogate = -(logq[y] - logp[y]).detach() * logp[y]
        case "student_topk", "reverse_kl":
            value = surrogate = topk_kl(logp, logq, objective.k)
        case "full", "reverse_kl":
            value = surrogate = (logp.exp() * (logp - logq)).sum(-1)
    (surrogate * problem.token_weight).sum().backward()
    loss = (value.detach() * problem.token_weight).sum()
    return {
        "loss": loss,
        "hidden": hidden.grad,
        "weight": weight.grad,
        **metrics(problem, objective, logp.detach(), logq, value.detach()),
    }


def best(logp: Tensor, k: int) -> list[int]:
    """Return the k most probable ids of one distribution, lowest id first among equals."""
    return sorted(range(len(logp)), key=lambda v: (-float(logp[v]), v))[:k]


def topk_kl(logp: Tensor, logq: Tensor, k: int) -> Tensor:
    """Return Eq. 5 of every token."""
    values = []
    for s, t in zip(logp, logq, strict=True):
        ids = best(s.detach(), k)
        p, q = s[ids].exp(), t[ids].exp()
        p, q = p / p.sum(), q / q.sum()
        values.append((p * (p / q).log()).sum())
    return torch.stack(values)


def overlap(p: Tensor, q: Tensor, k: int) -> dict[str, float]:
    """Return Eqs. 6, 7, 9, 10 and the top-1 agreement of one token, from probabilities."""
    mine, theirs = best(p, k), best(q, k)
    shared = sorted(set(mine) & set(theirs))
    mass_p, mass_q = sum(float(p[v]) for v in shared), sum(float(q[v]) for v in shared)
    advantage = sum(
        float(p[v]) / mass_p * math.log((float(q[v]) / mass_q) / (float(p[v]) / mass_p))
        for v in shared
    )
    return {
        "distill/overlap_ratio": len(shared) / k,
        "distill/overlap_advantage": advantage / len(shared) if shared else 0.0,
        "distill/overlap_empty": float(not shared),
        "distill/overlap_mass_student": mass_p,
        "distill/overlap_mass_teacher": mass_q,
        "distill/top1_agreement": float(mine[0] == theirs[0]),
    }


def metrics(
    problem: Problem, objective: Objective, logp: Tensor, logq: Tensor, value: Tensor
) -> dict:
    n, w = len(logp), problem.token_weight.double()
    y = torch.arange(n), problem.target
    p, q = logp.exp(), logq.exp()
    entropy_p, entropy_q = -(p * logp).sum(-1), -(q * logq).sum(-1)
    tokens = {
        "tokens": torch.ones(n).double(),
        "loss/objective": value,
        "student/nll": -logp[y],
        "student/entropy": entropy_p,
    }
    maxima = {}
    if objective.rollout_temperature is not None:
        z = problem.hidden @ problem.weight.T
        logpi = torch.log_softmax(z / objective.rollout_temperature, -1)[y]
        delta = logpi - problem.rollout_logp.double()
        tokens["policy/mismatch_kl"] = delta.exp() - 1 - delta
        maxima["policy/mismatch_max"] = delta[w != 0].abs().max()
    if objective.divergence != "cross_entropy":
        tokens |= {
            "teacher/nll": -logq[y],
            "teacher/entropy": entropy_q,
            "distill/entropy_gap": (entropy_q - entropy_p).abs(),
            "distill/reverse_kl": (p * (logp - logq)).sum(-1),
            "distill/support_kl": topk_kl(logp, logq, objective.k),
        }
        rows = [overlap(a, b, objective.k) for a, b in zip(p, q, strict=True)]
        for name in rows[0]:
            tokens[name] = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    return {"sums": {name: (w * x).sum() for name, x in tokens.items()}, "maxima": maxima}


def far(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of what is wanted."""
    scale = want.abs().max().item()
    return ((got.double() - want).abs().max() / (scale or 1.0)).item()
