"""What `Objective` does for the trainer: collectives, memory, the head's gradient, odd input."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opd.loss import Objective
from tests.distributed import run_ranks
from tests.loss.dense import batch_of, far, head_of, judge, make_problem, scores_of
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
    teacher = scores_of(
        problem, objective, payload, head_of(problem.teacher, rank, width, 0.0, group)
    )
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
