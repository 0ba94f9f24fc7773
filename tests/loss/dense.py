"""Random problems, the code under test as a rank calls it, and the reference it must agree with.

The reference has all logits at once, float64, and no gradient written down: autograd goes through
the formula of D itself, and for the policy gradient through Σ sg[c_v]·log p(v).

Shape suffixes: N tokens · V vocabulary · H hidden size.
"""

import inspect
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.loss import Objective
from megatron_opd.types import Head, HiddenScores, Microbatch, SampledScores, TopKScores
from tests.loss import formulas


@dataclass(frozen=True)
class Network:
    """The end of one model, whole: hidden states and what makes logits of them."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None

    def logits(self) -> Tensor:
        z_NV = self.hidden @ self.weight.T
        if self.bias is not None:
            z_NV = z_NV + self.bias
        return self.softcap * torch.tanh(z_NV / self.softcap) if self.softcap else z_NV

    def to(self, dtype: torch.dtype) -> "Network":
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


@dataclass(frozen=True)
class Problem:
    """Three models of different widths on the same N tokens, without padding and without ranks."""

    student: Network
    teacher: Network
    base: Network
    target: Tensor  # [N]
    mask: Tensor  # [N]
    rollout_logp: Tensor  # [N]
    position: Tensor  # [N]
    sequence: Tensor  # [N]
    rollout_ids: Tensor  # [N, K]
    reward: Tensor  # [N], of the response
    advantage: Tensor  # [N]
    drawn: Tensor  # [N]

    @property
    def vocab_size(self) -> int:
        return len(self.student.weight)

    def to(self, dtype: torch.dtype) -> "Problem":
        models = {name: getattr(self, name).to(dtype) for name in ("student", "teacher", "base")}
        return replace(self, **models)


def make_problem(
    seed: int = 0,
    lengths: tuple[int, ...] = (4, 3, 2),
    v: int = 13,
    h: int = 5,
    k: int = 4,
    bias: bool = False,
    softcap: float | None = None,
) -> Problem:
    """Return random models and responses; token 1 is not supervised, nor is the last response."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def network(width):
        return Network(normal(n, width), normal(v, width), normal(v) if bias else None, softcap)

    mask = torch.ones(n, dtype=torch.float64)
    if n > 1:
        mask[1] = 0.0
    if len(lengths) > 1:
        mask[n - lengths[-1] :] = 0.0
    student, teacher, base = network(h), network(h - 2), network(h + 1)
    target = torch.randint(v, (n,), generator=g)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Problem(
        student=student,
        teacher=teacher,
        base=base,
        target=target,
        mask=mask,
        # an engine that is nearly, but not quite, of the student's opinion
        rollout_logp=student.logits().log_softmax(-1)[range(n), target] + normal(n) / 2,
        position=torch.cat([torch.arange(length) for length in lengths]),
        sequence=sequence,
        rollout_ids=torch.rand(n, v, generator=g).argsort(-1)[:, :k],
        reward=(sequence % 2).double(),
        advantage=normal(len(lengths))[sequence],
        drawn=torch.ones(n, dtype=torch.float64),
    )


def logits_problem(student_NV: Tensor, teacher_NV: Tensor, base_NV: Tensor | None = None, y=0):
    """Return tokens of one response with these logits, and y for a target.

    Heads are identities on hidden states, whose gradient is therefore that of the logits.
    """
    n, v = student_NV.shape
    student, teacher, base = (
        Network(x, torch.eye(v, dtype=torch.float64))
        for x in (student_NV, teacher_NV, teacher_NV if base_NV is None else base_NV)
    )
    return replace(
        make_problem(lengths=(n,), v=v, k=3),
        student=student,
        teacher=teacher,
        base=base,
        target=torch.full((n,), y),
        mask=torch.ones(n, dtype=torch.float64),
    )


# The code under test, as one rank calls it


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


def rows_of(whole: Tensor, rank: int, width: int, junk: float) -> Tensor:
    """Return one rank's `width` rows of a head; the padding beyond its real rows is junk."""
    rows = torch.full((width, *whole.shape[1:]), junk, dtype=whole.dtype)
    real = whole[rank * width : (rank + 1) * width]
    rows[: len(real)] = real
    return rows


def head_of(
    network: Network, rank: int = 0, width: int | None = None, junk: float = 0.0, group=None
) -> Head:
    """Return one rank's head; a width of None is the vocabulary's."""
    width = width or len(network.weight)
    return Head(
        rows_of(network.weight, rank, width, junk),
        len(network.weight),
        group,
        bias_V=None if network.bias is None else rows_of(network.bias, rank, width, junk),
        softcap=network.softcap,
    )


def batch_of(problem: Problem, **fields) -> Microbatch:
    """Return the microbatch of these targets; the packed sequences behind it play no part."""
    unused = torch.empty(0, dtype=torch.int64)
    known = dict(
        token_T=unused,
        position_T=unused,
        cu_seqlens=unused,
        max_seqlen=0,
        source_N=unused,
        target_N=problem.target,
        mask_N=problem.mask,
        rollout_logp_N=problem.rollout_logp,
        position_N=problem.position,
        sequence_N=problem.sequence,
        measured_M=problem.mask.nonzero().flatten(),
        rollout_ids_NK=problem.rollout_ids,
        reward_N=problem.reward,
        advantage_N=problem.advantage,
        drawn_N=None if problem.drawn.all() else problem.drawn,
    )
    return Microbatch(**{**known, **fields})


def scores_of(problem: Problem, objective: Objective, payload: str, head: Head):
    """Return the teacher's judgement in one of its three forms."""
    if payload == "hidden":
        return HiddenScores(problem.teacher.hidden, head)
    temperature = objective.teacher_temperature
    logq = torch.log_softmax(problem.teacher.logits() / temperature, -1)
    if payload == "sampled":
        return SampledScores(logq.gather(-1, problem.target[:, None])[:, 0], temperature)
    logp, ids = logq.topk(objective.k)
    return TopKScores(ids, logp, temperature)


def judge(
    problem: Problem,
    objective: Objective,
    *,
    rank: int = 0,
    widths: tuple[int | None, int | None] = (None, None),
    group=None,
    payload: str = "hidden",
    junk: tuple[float, float] = (1e4, -3e4),
    upstream: float = 1.0,
    gradient_VH: Tensor | None = None,
    **fields,
) -> dict:
    """Run the code under test on one rank; `widths` are the head rows of student and teachers."""
    hidden = problem.student.hidden.clone().requires_grad_()
    head = head_of(problem.student, rank, widths[0], junk[0], group)
    head = replace(head, gradient_VH=gradient_VH)
    leaves = {"hidden": hidden, "weight": head.weight_VH, "bias": head.bias_V}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    teacher_head = head_of(problem.teacher, rank, widths[1], junk[1], group)
    base = HiddenScores(problem.base.hidden, head_of(problem.base, rank, widths[1], junk[0], group))
    got = objective(
        _Enter.apply(hidden, group),
        head,
        batch_of(problem, **fields),
        scores_of(problem, objective, payload, teacher_head) if objective.needs_teacher else None,
        base if objective.needs_base else None,
    )
    (got.loss * upstream).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return {**got._asdict(), "loss": got.loss.detach(), **gradients}


# The reference


def reference(problem: Problem, objective: Objective) -> dict:
    """Compute loss, count and gradients by the formulas and nothing else."""
    o, problem = objective, problem.to(torch.float64)
    leaves = {name: getattr(problem.student, name) for name in ("hidden", "weight", "bias")}
    leaves = {n: x.clone().requires_grad_() for n, x in leaves.items() if x is not None}
    problem = replace(problem, student=replace(problem.student, **leaves))
    s_NV = torch.log_softmax(problem.student.logits() / o.student_temperature, -1)
    t_NV = torch.log_softmax(problem.teacher.logits() / o.teacher_temperature, -1)
    b_NV = torch.log_softmax(problem.base.logits() / o.teacher_temperature, -1)
    value_N, surrogate_N = divergences(o, problem, s_NV, t_NV, b_NV)
    factor_N = token_factors(o, problem, s_NV.detach(), t_NV)
    gradients = torch.autograd.grad((factor_N * surrogate_N).sum(), list(leaves.values()))
    supervised = problem.mask != 0
    sequences = len(problem.sequence[supervised].unique())
    return {
        "loss": (factor_N * value_N.detach()).sum(),
        "count": int(supervised.sum()) if o.aggregation == "token-mean" else sequences,
        "corrected": None if o.correction == "none" else corrected(o, problem),
        **dict(zip(leaves, gradients, strict=True)),
    }


def divergences(o: Objective, problem: Problem, s_NV: Tensor, t_NV: Tensor, b_NV: Tensor):
    """Return D of every token, and what autograd is to go through instead of it, both [N]."""
    y = problem.target.tolist()
    if o.divergence == "cross_entropy":
        value_N = -s_NV[range(len(y)), y]
        return value_N, value_N
    tokens = list(zip(s_NV, t_NV, b_NV, y, problem.rollout_ids.tolist(), strict=True))
    sets = [formulas.support(o, s, t, y, rollout) for s, t, _, y, rollout in tokens]
    pairs = [
        formulas.categories(o, s, t, b, ids)
        for (s, t, b, *_), ids in zip(tokens, sets, strict=True)
    ]
    if o.form == "policy_gradient":
        return policy_gradient(o, problem, s_NV.detach(), t_NV, sets, pairs)
    terms = [formulas.direct(o, s, t, ids) for (s, t), ids in zip(pairs, sets, strict=True)]
    return torch.stack(terms), torch.stack(terms)


def policy_gradient(o: Objective, problem: Problem, s_NV: Tensor, t_NV: Tensor, sets, pairs):
    """Return Σ w·cost' and Σ sg[w·cost']·log p of every token, both [N]."""
    low = -math.inf if o.reward_floor is None else o.reward_floor
    high = math.inf if o.reward_cap is None else o.reward_cap
    costs = [-(-formulas.cost(o, s, t).detach()).clamp(low, high) for s, t in pairs]
    if o.group_normalize != "none":
        costs = [-advantage[None] for advantage in problem.advantage]
    costs = compared(o, problem, rewards_to_go(o, problem, costs))
    values, surrogates = [], []
    for i, (ids, (s, t)) in enumerate(zip(sets, pairs, strict=True)):
        cost = costs[i] - formulas.baseline(o, s_NV[i], t_NV[i])
        cost = cost - formulas.outcome(o) * problem.advantage[i]
        if (o.clip_low, o.clip_high, o.dual_clip) != (None, None, None):
            clipped = formulas.ppo(o, (s[0] - problem.rollout_logp[i]).exp(), -cost[0])
            values.append(clipped.detach())
            surrogates.append(clipped)
            continue
        w = formulas.reward_weights(o, s.detach(), t)
        if o.center_on_support:
            cost = cost - (w * cost).sum() / w.sum()
        c = w * cost if ids else torch.zeros_like(cost)
        values.append(c.sum())
        surrogates.append((c * s).sum())
    return torch.stack(values), torch.stack(surrogates)


def rewards_to_go(o: Objective, problem: Problem, costs: list[Tensor]) -> list[Tensor]:
    """Return Σ_{t'≥t} γ^(t'−t)·cost_t' over the supervised rest of the same response."""
    if not o.discount:
        return costs
    totals = []
    for i, start in enumerate(problem.position.tolist()):
        total = torch.zeros_like(costs[i])
        for j in supervised_with(problem, i):
            ahead = int(problem.position[j]) - start
            if ahead >= 0:
                total = total + o.discount**ahead * costs[j]
        totals.append(total)
    return totals


def compared(o: Objective, problem: Problem, costs: list[Tensor]) -> list[Tensor]:
    """Subtract the mean of the response where that is the baseline."""
    if o.baseline != "mean":
        return costs
    rows = [supervised_with(problem, i) for i in range(len(costs))]
    return [
        cost - sum(costs[j] for j in same) / max(len(same), 1)
        for cost, same in zip(costs, rows, strict=True)
    ]


def supervised_with(problem: Problem, i: int) -> list[int]:
    """Return the supervised tokens of the response that token i is in."""
    same = (problem.sequence == problem.sequence[i]) & (problem.mask != 0)
    return same.nonzero().flatten().tolist()


def token_factors(o: Objective, problem: Problem, s_NV: Tensor, t_NV: Tensor) -> Tensor:
    """Return a_t·w_t·T², zero where a token is not supervised."""
    known, factor_N = facts(o, problem, s_NV, t_NV), problem.mask.double().clone()
    for function, options in o.weights.items():
        function = function if callable(function) else formulas.WEIGHTS[function]
        wanted = [name for name in inspect.signature(function).parameters if name in known]
        factor_N = factor_N * function(**{name: known[name] for name in wanted}, **options)
    factor_N = factor_N * torch.tensor(
        [formulas.correction(o, x) for x in ratios(o, problem)], dtype=torch.float64
    )
    if o.aggregation == "seq-mean-token-mean":
        for i in range(len(factor_N)):
            factor_N[i] /= max(len(supervised_with(problem, i)), 1)
    if o.aggregation == "seq-mean-token-sum-norm":
        factor_N = factor_N / o.fixed_length
    square = o.student_temperature * o.teacher_temperature
    return factor_N * square if o.temperature_squared else factor_N


def facts(o: Objective, problem: Problem, s_NV: Tensor, t_NV: Tensor) -> dict[str, Tensor]:
    """Return everything a weight may ask for."""
    n, y = range(len(s_NV)), problem.target
    top = [[set(formulas.best(row, o.k)) for row in logp] for logp in (s_NV, t_NV)]
    shared = [len(mine & theirs) / o.k for mine, theirs in zip(*top, strict=True)]
    return {
        "position_N": problem.position,
        "sequence_N": problem.sequence,
        "mask_N": problem.mask,
        "rollout_logp_N": problem.rollout_logp,
        "student_logp_N": s_NV[n, y],
        "teacher_logp_N": t_NV[n, y],
        "student_entropy_N": -(s_NV.exp() * s_NV).sum(-1),
        "teacher_entropy_N": -(t_NV.exp() * t_NV).sum(-1),
        "overlap_N": torch.tensor(shared, dtype=torch.float64),
        "log_ratio_N": torch.tensor(ratios(o, problem), dtype=torch.float64).log(),
        "reward_N": problem.reward,
        "advantage_N": problem.advantage,
        "drawn_N": problem.drawn,
    }


def ratios(o: Objective, problem: Problem) -> list[float]:
    """Return π/μ of every token: the student at the rollout's temperature, and the engine.

    A token that nobody drew has none: 1.
    """
    z_NV = problem.student.logits().detach()
    log_pi_NV = torch.log_softmax(z_NV / (o.rollout_temperature or 1), -1)
    log_pi_N = log_pi_NV[range(len(z_NV)), problem.target]
    return torch.where(problem.drawn != 0, log_pi_N - problem.rollout_logp, 0).exp().tolist()


def corrected(o: Objective, problem: Problem) -> tuple[int, int]:
    """Return on how many supervised, drawn tokens the correction acts, and how many there are."""
    supervised = (problem.mask * problem.drawn != 0).tolist()
    acts = [formulas.corrected(o, x) for x in ratios(o, problem)]
    return sum(a and b for a, b in zip(acts, supervised, strict=True)), sum(supervised)


def far(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of what is wanted."""
    if not want.numel():
        return 0.0
    scale = want.abs().max().item()
    return ((got.double() - want.double()).abs().max() / (scale or 1.0)).item()
