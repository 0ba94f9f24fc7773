"""What `Objective` does for the trainer: collectives, memory, the head's gradient, odd input."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opd.loss import Objective
from megatron_opd.loss.candidates import Clip
from tests.distributed import run_ranks
from tests.loss.dense import (
    batch_of,
    far,
    head_of,
    judge,
    make_problem,
    reference,
    scores_of,
)
from tests.loss.test_objective import PG, PROBLEMS, SETS, SUPPORTS, short, structures


class Watch(TorchDispatchMode):
    """Record the operations that run below it, and the largest tensor that one of them returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


# (options, payload, collectives a chunk)
COLLECTIVES = (
    (dict(support="sampled", **PG), "hidden", 1),
    (dict(support="sampled", estimator="k2"), "sampled", 1),
    (dict(support="student_topk"), "hidden", 2),
    (dict(support="rollout_topk"), "hidden", 1),
    (dict(support="teacher_topk"), "topk", 1),
    (dict(support="full"), "hidden", 2),
    (dict(support="full", correction="mask"), "hidden", 3),
    (dict(PG, support="sampled", divergence="outcome", clip_high=0.2), "hidden", 1),
    (dict(PG, support="sampled", outcome=1.0), "sampled", 1),
)


def count_collectives(rank, problem):
    counts = []
    for options, payload, _ in COLLECTIVES:
        made = []
        for chunk_tokens in (3, 1):  # 9 tokens: 3 chunks and 9
            objective = Objective(**options, k=4, chunk_tokens=chunk_tokens)
            arguments = arguments_of(problem, objective, rank, payload)
            with Watch() as watch:
                objective(*arguments)
            made.append(sum("c10d::" in name for name in watch.names))
        counts.append((made[1] - made[0]) / 6)
    return counts


def arguments_of(problem, objective, rank=0, payload="hidden"):
    """Return what the objective is called with where two ranks have 7 rows each; or one has all."""
    group, width = (dist.group.WORLD, 7) if dist.is_initialized() else (None, None)
    student = head_of(problem.student, rank, width, 0.0, group)
    student.weight_VH.requires_grad_()
    theirs = head_of(problem.teacher, rank, width, 0.0, group)
    teacher = scores_of(problem, objective, payload, theirs) if objective.needs_teacher else None
    batch = batch_of(problem, measured_M=torch.empty(0, dtype=torch.int64))
    return problem.student.hidden, student, batch, teacher


def test_collectives_a_chunk_where_nothing_is_measured():
    want = [count for *_, count in COLLECTIVES]
    assert run_ranks(count_collectives, 2, make_problem())[0] == want


@pytest.mark.parametrize(
    "options",
    [
        dict(PG, support="sampled"),
        *(dict(o, support=s) for s in (*SETS, "full") for o in ({}, PG)),
        dict(support="student_topk", correction="icepop"),
    ],
    ids=str,
)
def test_nothing_of_size_tokens_times_vocabulary_exists(options):
    """64 tokens in chunks of 4: no tensor exceeds the logits of two models on a chunk, or the head;
    kept for backward are the gradients of hidden states and head."""
    n, chunk, v, h = 64, 4, 512, 5
    problem = make_problem(lengths=(n,), v=v, h=h)
    for normalize in ("support", "vocab"):
        objective = Objective(**options, normalize=normalize, k=4, chunk_tokens=chunk)
        arguments, saved = arguments_of(problem, objective), []

        def save(x, saved=saved):
            saved.append(tuple(x.shape))
            return x

        with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            loss = objective(*arguments).loss
            loss.backward()
        assert watch.largest <= max(2 * chunk * v, v * h)
        assert sorted(saved) == [(n, h), (v, h)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, dict(support="full"), dict(PG, support="sampled")], ids=str
)
def test_a_gradient_buffer_takes_the_weights_gradient(options, dtype):
    """What was in it stays, autograd has none for the weight, and the rest is as ever. Megatron's
    main_grad is fp32 where the weight is bf16, and spares the gradient the rounding by 2^-8."""
    problem, objective = PROBLEMS[1].to(dtype), Objective(**options, k=4, chunk_tokens=3)
    plain = judge(problem, objective)
    wide = torch.promote_types(dtype, torch.float32)
    before = torch.full((13, 5), 0.25, dtype=wide)
    buffer = before.clone()
    got = judge(problem, objective, gradient_VH=buffer)
    assert got["weight"] is None and plain["weight"].dtype == dtype
    tolerance = 1e-12 if dtype == wide else 2**-8
    assert far(buffer - before, plain["weight"]) < tolerance
    for name in ("loss", "hidden", "bias"):
        assert torch.equal(got[name], plain[name])


def test_upstream_scales_the_gradient():
    for problem in PROBLEMS:
        one, many = (judge(problem, Objective(k=4), upstream=x) for x in (1.0, 0.125))
        for name in {"hidden", "weight", "bias"} & set(one):
            assert torch.equal(one[name] * 0.125, many[name])


def test_backward_a_second_time_is_refused():
    objective = Objective(k=4)
    loss = objective(*arguments_of(make_problem(), objective)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("trains", [True, False])
def test_the_loss_may_be_divided_in_place(trains):
    """As the pipeline schedule does: the gradient follows, the metrics do not."""
    problem, objective = make_problem(), Objective(k=4)
    whole, arguments = judge(problem, objective), arguments_of(problem, objective)
    with torch.set_grad_enabled(trains):
        got = objective(*arguments)
    before = {name: total.clone() for name, (total, _) in got.means.items()}
    loss = got.loss
    loss /= 2
    assert all(torch.equal(got.means[name][0], total) for name, total in before.items())
    assert loss.requires_grad is trains
    if trains:
        (gradient,) = torch.autograd.grad(loss, arguments[1].weight_VH)
        assert torch.equal(gradient, whole["weight"] / 2)


@pytest.mark.parametrize("support", SUPPORTS)
def test_not_even_nan_in_padding_is_noticed(support):
    """Of heads with 3 rows too many, bias and soft-cap included."""
    for problem in PROBLEMS:
        for options in structures(support)[::9]:
            objective = Objective(**options, k=4)
            clean, dirty = (
                judge(problem, objective, widths=(16, 16), junk=junk)
                for junk in ((0.0, 0.0), (math.nan, math.inf))
            )
            for name in ("loss", "hidden", "weight"):
                assert torch.equal(clean[name], dirty[name]), f"{name} of {short(objective)}"


@pytest.mark.parametrize("support", SUPPORTS)
def test_no_supervised_token_is_a_loss_of_zero(support):
    problem = make_problem()
    nobody = replace(problem, mask=torch.zeros_like(problem.mask))
    rows = ("target", "mask", "rollout_logp", "position", "sequence", "rollout_ids")
    models = {
        name: replace(getattr(problem, name), hidden=getattr(problem, name).hidden[:0])
        for name in ("student", "teacher", "base")
    }
    nothing = replace(problem, **models, **{name: getattr(problem, name)[:0] for name in rows})
    for options in structures(support)[::5]:
        for empty in (nobody, nothing):
            got = judge(empty, Objective(**options, k=4))
            assert got["loss"] == 0 == got["count"] and not got["weight"].any(), options
            assert got["hidden"].shape == empty.student.hidden.shape and not got["hidden"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_broken_hidden_state_breaks_the_loss(support, bad):
    problem = make_problem()
    problem.student.hidden[0, 2] = bad
    for options in structures(support)[::9]:
        got = judge(problem, Objective(**options, k=4))
        assert not got["loss"].isfinite(), options
        assert not got["hidden"][0].isfinite().all(), options
        assert not got["weight"].isfinite().all(), options


def test_a_target_outside_the_vocabulary_breaks_the_loss():
    for outside in (13, 14, -100):
        problem = make_problem()
        problem.target[0] = outside
        objective = Objective(support="sampled", divergence="cross_entropy")
        assert not judge(problem, objective, widths=(16, 16))["loss"].isfinite(), outside


@pytest.mark.parametrize(
    "options",
    [
        dict(support="full", correction="mask", correction_high=1.2),
        dict(support="student_topk", correction="tis", correction_high=1.1),
        dict(support="full", weights={"data_only": {}}),
        dict(PG, support="sampled", weights={"rollout_only": {}}, correction="icepop"),
    ],
    ids=str,
)
def test_what_nobody_drew_has_no_ratio(options):
    """A dataset's response among the engine's: it is weighed by 1, and policy/* do not count it."""
    problem, objective = make_problem(7), Objective(**options, k=4, chunk_tokens=2)
    problem = replace(problem, drawn=(problem.sequence != 0).double())
    problem.rollout_logp[problem.sequence == 0] = 0.0  # as the replay engine says
    got, want = judge(problem, objective), reference(problem, objective)
    for name in ("loss", "hidden", "weight"):
        assert far(got[name], want[name]) < 1e-9, name
    assert want["loss"] != 0
    drawn = int((problem.mask * problem.drawn).sum())
    counts = {name: int(count) for name, (_, count) in got["means"].items() if "policy" in name}
    assert counts and set(counts.values()) == {drawn}
    if want["corrected"]:
        assert int(got["means"]["policy/corrected_fraction"][0]) == want["corrected"][0]
    all_drawn = judge(replace(problem, drawn=torch.ones_like(problem.drawn)), objective)
    assert got["maxima"]["policy/mismatch_max"] < all_drawn["maxima"]["policy/mismatch_max"]


def test_ppo_by_hand_and_where_it_is_flat():
    """ρ = 1.5, 0.5 with A = ±1: a gain is cut off above, a loss below, and by a dual clip above."""
    clip, unbounded = Clip(0.2, 0.2, 1.4), Clip(None, 0.2, None)
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 1.1])
    cost = torch.tensor([-1.0, -1, 1, 1, -1, 1])  # −A
    value, c, flat = clip.coefficients(ratio, cost)
    torch.testing.assert_close(value, torch.tensor([-1.2, -0.5, 1.4, 0.8, -1.1, 1.1]))
    torch.testing.assert_close(c, torch.tensor([0, -0.5, 0, 0, -1.1, 1.1]))
    assert flat.tolist() == [True, False, True, True, False, False]
    value, c, flat = unbounded.coefficients(ratio, cost)
    torch.testing.assert_close(value, torch.tensor([-1.2, -0.5, 1.5, 0.5, -1.1, 1.1]))
    assert flat.tolist() == [True] + 5 * [False]
    options = dict(PG, support="sampled", divergence="outcome", clip_low=0.1, clip_high=0.1)
    problem = make_problem(3)
    problem = replace(problem, drawn=(problem.sequence != 1).double())
    total, count = judge(problem, Objective(**options))["means"]["policy/clipped_fraction"]
    log_p = problem.student.logits().log_softmax(-1)[range(9), problem.target]
    ratio, counted = (log_p - problem.rollout_logp).exp(), problem.mask * problem.drawn
    outside = torch.where(problem.advantage > 0, ratio > 1.1, ratio < 0.9)
    assert (int(total), int(count)) == (int((outside * counted).sum()), int(counted.sum()))
    assert 0 < total < count
