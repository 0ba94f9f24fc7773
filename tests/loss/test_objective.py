"""Value and gradient of every objective against the dense float64 reference, on 1 to 4 ranks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_opd.loss import Objective
from megatron_opd.types import Head, HiddenScores
from tests.distributed import run_ranks
from tests.loss.dense import batch_of, far, judge, make_problem, reference

OBJECTIVES = [
    dict(support="sampled", divergence="cross_entropy"),
    dict(support="sampled", k=5),
    dict(support="student_topk", k=2),
    dict(support="student_topk", k=5),
    dict(support="student_topk", k=13),
    dict(support="full", k=3),
]
TEMPERATURES = [
    {},
    dict(student_temperature=0.7, teacher_temperature=1.3, rollout_temperature=0.9),
]
CHUNKS = (1, 3, 7, 100)
# (ranks, rows a rank) for 13 entries: padding on the last rank, on it alone, on several
LAYOUTS = [(1, 13), (1, 16), (2, 8), (2, 14), (4, 4), (4, 6)]
with_teacher = pytest.mark.parametrize("kind", OBJECTIVES[1:], ids=str)


def every_case():
    for kind in OBJECTIVES:
        for temperatures in TEMPERATURES:
            for chunk_tokens in CHUNKS:
                yield Objective(**kind, **temperatures, chunk_tokens=chunk_tokens)


def judge_all(rank, problem, objectives, world, width, junk):
    group = dist.group.WORLD if world > 1 else None
    return [judge(problem, o, rank=rank, width=width, group=group, junk=junk) for o in objectives]


def on_ranks(problem, objectives, world, width, junk=(1e4, -3e4)):
    """Return one result per objective, as one rank without padding would: the head put together."""
    args = (problem, objectives, world, width, junk)
    ranks = run_ranks(judge_all, world, *args) if world > 1 else [judge_all(0, *args)]
    results = []
    for pieces in zip(*ranks, strict=True):
        head = torch.cat([piece["weight"] for piece in pieces])
        vocabulary = len(problem.weight)
        assert not head[vocabulary:].any(), "padding has a gradient"
        for other in pieces[1:]:
            for name in ("loss", "hidden"):
                assert torch.equal(pieces[0][name], other[name]), f"ranks differ in {name}"
            assert pieces[0]["sums"] == other["sums"] and pieces[0]["maxima"] == other["maxima"]
        results.append({**pieces[0], "weight": head[:vocabulary]})
    return results


def assert_close(got, want, tolerance, case):
    for name in ("loss", "hidden", "weight"):
        assert far(got[name], want[name]) < tolerance, f"{name} of {case}"
    for kind in ("sums", "maxima"):
        assert got[kind].keys() == want[kind].keys(), case
        for name, value in want[kind].items():
            error = abs(got[kind][name].item() - value.item())
            assert error < tolerance * max(1.0, abs(value)), f"{name} of {case}"


@pytest.mark.parametrize(("world", "width"), LAYOUTS)
def test_value_gradient_and_metrics_are_the_dense_ones(world, width):
    problem, objectives = make_problem(), list(every_case())
    results = on_ranks(problem, objectives, world, width)
    for objective, got in zip(objectives, results, strict=True):
        assert_close(got, reference(problem, objective), 1e-9, objective)


@pytest.mark.parametrize(("world", "width"), [(1, 41), (2, 21), (4, 11)])
def test_fp32_is_close_to_float64(world, width):
    problem = make_problem(seed=1, n=9, v=41, h=8, h_teacher=6)
    single = problem.to(torch.float32)
    objectives = [Objective(**kind, chunk_tokens=4) for kind in OBJECTIVES]
    for objective, got in zip(objectives, on_ranks(single, objectives, world, width), strict=True):
        assert got["loss"].dtype == got["weight"].dtype == torch.float32
        assert_close(got, reference(single, objective), 1e-5, objective)


@pytest.mark.parametrize(("world", "width"), [(1, 41), (2, 21)])
def test_bf16_rounds_products_and_nothing_else(world, width):
    """With one-hot hidden states the logits are bf16 numbers, so that no product rounds: the loss
    is exact to fp32, and gradients to a few roundings of 2^-9 each."""
    problem = make_problem(seed=2, n=9, v=41, h=9, h_teacher=9)
    one_hot = torch.eye(9, dtype=torch.float64)
    problem = replace(problem, hidden=one_hot, teacher_hidden=one_hot.flip(0)).to(torch.bfloat16)
    objectives = [Objective(**kind, chunk_tokens=4) for kind in OBJECTIVES]
    for objective, got in zip(objectives, on_ranks(problem, objectives, world, width), strict=True):
        want = reference(problem, objective)
        assert got["hidden"].dtype == got["weight"].dtype == torch.bfloat16
        assert got["loss"].dtype == torch.float32
        assert far(got["loss"], want["loss"]) < 1e-6, objective
        logit_gradient = want["weight"].T.abs()  # the weight's, since hidden states are one-hot
        sizes = {
            "hidden": logit_gradient @ problem.weight.double().abs(),
            "weight": logit_gradient.T,
        }
        for name, roundings in (("hidden", 3), ("weight", 2)):  # ∂/∂z, its product, sum over ranks
            error = (got[name].double() - want[name]).abs()
            assert (error < roundings * 2**-9 * sizes[name] + 1e-6).all(), f"{name} of {objective}"


@pytest.mark.parametrize("kind", [OBJECTIVES[i] for i in (0, 1, 4, 5)], ids=str)
def test_bf16_products_move_the_loss_by_their_rounding(kind):
    """Not for small top-k sets: the loss jumps where rounded logits tie and another entry is in."""
    problem = make_problem(seed=3, n=30, v=41, h=8, h_teacher=8).to(torch.bfloat16)
    problem = replace(problem, hidden=problem.hidden / 2, teacher_hidden=problem.teacher_hidden / 2)
    got, want = judge(problem, Objective(**kind)), reference(problem, Objective(**kind))
    assert (got["loss"] - want["loss"]).abs() < 2**-8 * problem.token_weight.sum()
    assert far(got["hidden"], want["hidden"]) < 2**-7
    assert far(got["weight"], want["weight"]) < 2**-7


@with_teacher
@pytest.mark.parametrize(("world", "width"), LAYOUTS)
def test_student_and_teacher_alike_have_no_loss_and_no_gradient(kind, world, width):
    """Exactly none, whatever lies in their padding rows: log p and log q are the same numbers."""
    p = make_problem()
    alike = replace(p, teacher_hidden=p.hidden, teacher_weight=p.weight).to(torch.float32)
    (got,) = on_ranks(alike, [Objective(**kind, chunk_tokens=3)], world, width)
    assert got["loss"] == 0 and not got["hidden"].any() and not got["weight"].any()
    assert got["sums"]["distill/reverse_kl"] == 0
    # not exactly: an all-reduce adds the ranks in another order for every position of the buffer
    assert got["sums"]["distill/entropy_gap"] < 1e-6 * got["sums"]["tokens"]
    assert got["sums"]["distill/overlap_ratio"] == got["sums"]["tokens"]


@pytest.mark.parametrize(("world", "width"), [(1, 16), (2, 14), (4, 4)])
def test_not_even_nan_in_padding_is_noticed(world, width):
    problem, objectives = make_problem(), [Objective(**kind) for kind in OBJECTIVES]
    clean = on_ranks(problem, objectives, world, width, junk=(0.0, 0.0))
    dirty = on_ranks(problem, objectives, world, width, junk=(math.nan, math.inf))
    for objective, a, b in zip(objectives, clean, dirty, strict=True):
        for name in ("loss", "hidden", "weight"):
            assert torch.equal(a[name], b[name]), f"{name} of {objective}"
        assert a["sums"] == b["sums"]


def test_topk_of_the_whole_vocabulary_is_full():
    problem = make_problem()
    whole = judge(problem, Objective(support="student_topk", k=13))
    full = judge(problem, Objective(support="full", k=13))
    for name in ("loss", "hidden", "weight"):
        assert far(whole[name], full[name]) < 1e-12, name


def test_expectation_of_the_sampled_objective_is_full():
    """One token per entry v, weighted by p(v): its gradient is that of the full divergence."""
    problem = make_problem(n=1)
    logp = torch.log_softmax(problem.hidden @ problem.weight.T, -1)[0]
    one = replace(problem, token_weight=torch.ones(1, dtype=torch.float64))
    draws = replace(
        problem,
        hidden=problem.hidden.expand(13, -1),
        teacher_hidden=problem.teacher_hidden.expand(13, -1),
        target=torch.arange(13),
        token_weight=logp.exp(),
        rollout_logp=logp,
    )
    mean = judge(draws, Objective(support="sampled", k=4))
    full = judge(one, Objective(support="full", k=4))
    assert far(mean["loss"], full["loss"]) < 1e-12
    assert far(mean["hidden"].sum(0), full["hidden"][0]) < 1e-12
    assert far(mean["weight"], full["weight"]) < 1e-12


def test_sampled_reverse_kl_is_cross_entropy_weighted_by_the_advantage():
    problem = make_problem()
    y = torch.arange(7), problem.target
    advantage = (
        torch.log_softmax(problem.teacher_hidden @ problem.teacher_weight.T, -1)[y]
        - torch.log_softmax(problem.hidden @ problem.weight.T, -1)[y]
    )
    distilled = judge(problem, Objective(support="sampled", k=4))
    weighted = replace(problem, token_weight=problem.token_weight * advantage)
    supervised = judge(weighted, Objective(support="sampled", divergence="cross_entropy"))
    for name in ("hidden", "weight"):
        assert far(distilled[name], supervised[name]) < 1e-12, name


@pytest.mark.parametrize("kind", [OBJECTIVES[0], OBJECTIVES[3], OBJECTIVES[5]], ids=str)
def test_gradient_is_the_slope_of_the_value(kind):
    """Central differences; not for the sampled estimate, whose gradient is not its value's."""
    problem, step = make_problem(), 1e-5
    objective = Objective(**kind, student_temperature=0.8)
    gradient = judge(problem, objective)
    for name in ("hidden", "weight"):
        for row, column in [(0, 0), (2, 3), (6, 4)]:
            values = []
            for sign in (1, -1):
                moved = getattr(problem, name).clone()
                moved[row, column] += sign * step
                values.append(judge(replace(problem, **{name: moved}), objective)["loss"])
            slope = (values[0] - values[1]) / (2 * step)
            assert abs(slope - gradient[name][row, column]) < 1e-8, (name, row, column)


def test_upstream_scales_the_gradient():
    problem, objective = make_problem(), Objective(k=4)
    one, many = judge(problem, objective), judge(problem, objective, upstream=0.125)
    for name in ("hidden", "weight"):
        assert torch.equal(one[name] * 0.125, many[name])


def test_backward_a_second_time_is_refused():
    problem = make_problem()
    weight = problem.weight.clone().requires_grad_()
    objective = Objective(support="sampled", divergence="cross_entropy")
    loss = objective(problem.hidden, Head(weight, 13), batch_of(problem)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("trains", [True, False])
def test_the_loss_may_be_divided_in_place(trains):
    """As the pipeline schedule does: the gradient follows, the metrics do not."""
    problem = make_problem()
    objective = Objective(support="sampled", divergence="cross_entropy")
    whole = judge(problem, objective)
    weight = problem.weight.clone().requires_grad_()
    with torch.set_grad_enabled(trains):
        loss, sums, _ = objective(problem.hidden, Head(weight, 13), batch_of(problem))
    loss /= 2
    assert torch.equal(sums["loss/objective"], whole["loss"])
    assert loss.requires_grad is trains
    if trains:
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.equal(gradient, whole["weight"] / 2)


@pytest.mark.parametrize("kind", OBJECTIVES, ids=str)
def test_no_supervised_token_is_a_loss_of_zero(kind):
    problem, nothing = make_problem(), torch.zeros(0, dtype=torch.float64)
    empty = replace(
        problem,
        hidden=problem.hidden[:0],
        teacher_hidden=problem.teacher_hidden[:0],
        target=problem.target[:0],
        token_weight=nothing,
        rollout_logp=nothing,
    )
    objective = Objective(**kind)
    got = judge(empty, objective)
    assert got["loss"] == 0 and not got["weight"].any() and got["hidden"].shape == (0, 5)
    assert set(got["sums"]) == {"tokens", *objective.mean_metrics}
    assert not any(got["sums"].values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", OBJECTIVES, ids=str)
def test_a_broken_hidden_state_breaks_the_loss(kind, bad):
    problem = make_problem()
    problem.hidden[1, 2] = bad
    got = judge(problem, Objective(**kind))
    assert not got["loss"].isfinite()
    assert got["hidden"][1].isnan().any() and got["weight"].isnan().any()


def test_a_target_outside_the_vocabulary_breaks_the_loss():
    problem = make_problem()
    for outside in (13, 14, -100):
        problem.target[0] = outside
        got = judge(problem, Objective(support="sampled", divergence="cross_entropy"), width=16)
        assert got["loss"].isnan(), outside


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(support="teacher"), "objective.support: got 'teacher', expected one of sampled, "),
        (dict(support="full", divergence="cross_entropy"), "with support=full, expected one of"),
        (dict(divergence="jsd"), "objective.divergence: got 'jsd'"),
        (dict(k=1), "objective.k: got 1, expected 2 or more: .* the gradient is zero"),
        (dict(support="full", k=0), "objective.k: got 0, expected 1 or more"),
        (dict(chunk_tokens=0), "objective.chunk_tokens: got 0"),
        (dict(student_temperature=0.0), "objective.student_temperature: got 0.0, expected more"),
        (dict(rollout_temperature=math.nan), "objective.rollout_temperature: got nan"),
    ],
)
def test_impossible_objectives_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Objective(**options)
    assert "\n" not in str(error.value)


def test_impossible_calls_are_refused():
    problem = make_problem()
    head, batch = Head(problem.weight, 13), batch_of(problem)
    teacher = HiddenScores(problem.teacher_hidden, Head(problem.teacher_weight, 13))
    supervised = Objective(support="sampled", divergence="cross_entropy")
    with pytest.raises(ValueError, match=r"teacher: got none, .*divergence=reverse_kl needs one"):
        Objective()(problem.hidden, head, batch)
    with pytest.raises(ValueError, match=r"teacher: got one, .*divergence=cross_entropy uses none"):
        supervised(problem.hidden, head, batch, teacher)
    with pytest.raises(ValueError, match=r"objective\.k: got 14, expected at most .* 13"):
        Objective(k=14)(problem.hidden, head, batch, teacher)
    shorter = HiddenScores(problem.teacher_hidden, Head(problem.teacher_weight[:12], 13))
    with pytest.raises(AssertionError, match="student has 13 head rows here, teacher 12"):
        Objective(k=4)(problem.hidden, head, batch, shorter)
