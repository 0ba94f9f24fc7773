"""Sums of objectives: value and gradient against the dense reference of their terms, TP 1, 2, 4."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_opd.loss import Objective, Total
from tests.distributed import run_ranks
from tests.loss.dense import batch_of, far, head_of, judge, make_problem, reference, scores_of

PG = dict(form="policy_gradient")
OUTCOME = dict(PG, support="sampled", divergence="outcome")
CE = dict(support="sampled", divergence="cross_entropy")
FKL = dict(support="teacher_topk", normalize="vocab", divergence="forward_kl", k=4)
SUMS = {
    "distillation and GRPO": (dict(k=4), dict(OUTCOME, name="rl", weight=0.3)),
    "GRPO and distillation": (dict(OUTCOME, weight=2.0), dict(name="kd", support="full", k=4)),
    "CE and KD": (dict(CE, weight=0.3), dict(name="kd", support="full", k=4, weight=0.7)),
    "EOPD": (
        dict(PG, support="sampled", k=4, clip_low=0.2, clip_high=0.2),
        dict(FKL, name="fkl", weights={"teacher_entropy_gate": dict(threshold=1.9)}),
    ),
    "three, by sequences": (
        dict(k=4, aggregation="seq-mean-token-sum", correction="tis", extrapolation=1.25),
        dict(CE, name="ce", aggregation="seq-mean-token-mean", weights={"correct_only": {}}),
        dict(
            OUTCOME,
            name="rl",
            k=4,
            weight=-0.5,
            aggregation="seq-mean-token-sum-norm",
            fixed_length=3,
            correction="tis",
            weights={"rlsd": {}},
        ),
    ),
    "a schedule's end": (dict(k=4, weight=0.0), dict(CE, name="ce")),
}
PROBLEM = make_problem(5, (4, 3, 2), bias=True)
WIDTHS = {1: (13, 13), 2: (7, 7), 4: (4, 4)}


def total_of(name):
    return Total(tuple(Objective(**options, chunk_tokens=4) for options in SUMS[name]))


def expected(total):
    """Return the weighted sum of what the terms are alone, and each term's loss."""
    alone = [reference(PROBLEM, term) for term in total.terms]
    weights = [term.weight for term in total.terms]
    summed = {
        name: sum(w * one[name] for w, one in zip(weights, alone, strict=True))
        for name in ("loss", "hidden", "weight", "bias")
    }
    return summed | {"losses": [one["loss"] for one in alone], "count": alone[0]["count"]}


def judge_sums(rank, world, at_once):
    found = []
    for name in SUMS:
        total, width = total_of(name), WIDTHS[world]
        buffer = torch.zeros(width[0], 5, dtype=torch.float64) if at_once else None
        group = dist.group.WORLD if world > 1 else None
        how = dict(rank=rank, widths=width, group=group, gradient_VH=buffer)
        got = judge(PROBLEM, total, **how)
        found.append(got | ({"weight": buffer} if at_once else {}))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_sum_is_the_weighted_sum_of_its_terms(world, at_once):
    ranks = run_ranks(judge_sums, world, world, at_once)
    for name, *pieces in zip(SUMS, *ranks, strict=True):
        total, got = total_of(name), pieces[0]
        want = expected(total)
        rows = {key: torch.cat([piece[key] for piece in pieces])[:13] for key in ("weight", "bias")}
        assert int(got["count"]) == want["count"], name
        for key in ("loss", "hidden", "weight", "bias"):
            assert far(rows.get(key, got[key]), want[key]) < 1e-9, (name, key)
        for term, loss in zip(total.terms, want["losses"], strict=True):
            value, count = got["means"][f"loss/{term.name}"]
            assert far(value, loss) < 1e-9 and int(count) == want["count"], name
        assert far(got["means"]["loss/total"][0], want["loss"]) < 1e-9


def test_a_student_that_is_its_teacher_is_left_with_the_rest():
    """The distillation part is zero: loss and gradient are those of the rewards alone."""
    same = replace(PROBLEM, teacher=PROBLEM.student)
    rewards = Objective(**OUTCOME, weight=0.3, name="rl")
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        full = Objective(support="full", divergence=divergence, k=4)
        got, want = judge(same, Total((full, rewards))), judge(same, rewards)
        assert abs(got["means"]["loss/objective"][0]) < 1e-13
        for key in ("loss", "hidden", "weight"):
            assert far(got[key], want[key]) < 1e-12
    (plus, alone) = (
        judge(same, Objective(**PG, support="sampled", outcome=0.3, k=4, **extra))
        for extra in ({}, {"clip_high": 0.2})
    )
    assert far(plus["hidden"], judge(same, rewards)["hidden"]) < 1e-12
    assert far(alone["hidden"], plus["hidden"]) > 0.01  # the ratio is not one


def test_who_measures_and_what_the_metrics_of_terms_are_called():
    """The first term that asks a teacher looks at both models; the others only say their losses."""
    got = judge(PROBLEM, total_of("GRPO and distillation"))["means"]
    assert {"distill/reverse_kl", "loss/kd", "loss/objective", "loss/total"} <= set(got)
    alone = judge(PROBLEM, Objective(support="full", k=4))["means"]
    for name in alone:
        assert name == "loss/objective" or far(got[name][0], alone[name][0]) < 1e-12, name
    clipped = dict(OUTCOME, clip_high=0.1)
    both = Total((Objective(k=4), Objective(**clipped, name="a"), Objective(**clipped, name="b")))
    found = {name for name in judge(PROBLEM, both)["means"] if "clipped" in name}
    assert found == {"policy/clipped_fraction.a", "policy/clipped_fraction.b"}


@pytest.mark.parametrize(
    ("terms", "line"),
    [
        ((dict(k=4), dict(CE, name="total")), "terms: got 'total', expected a name of letters"),
        ((dict(k=4), dict(CE, name="a.b")), "terms: got 'a.b', expected a name of letters"),
        (
            (dict(k=4), dict(CE, name="ce", aggregation="seq-mean-token-sum")),
            "terms.ce.aggregation: got 'seq-mean-token-sum', but objective.aggregation=token-mean",
        ),
        (
            (dict(k=4), dict(support="rollout_topk", k=5, name="r")),
            "terms.r.k: got 5, expected 4 as in objective: the engine lists",
        ),
        (
            (dict(PG, support="sampled", group_normalize="std"), dict(OUTCOME, name="rl")),
            "objective.group_normalize: a token has one advantage",
        ),
    ],
    ids=lambda x: "",
)
def test_terms_that_do_not_go_together(terms, line):
    with pytest.raises(ValueError) as error:
        Total(tuple(Objective(**options) for options in terms))
    assert str(error.value).startswith(line)


def test_a_teacher_that_answers_once_must_do_for_all_terms():
    sent = Total((Objective(**FKL), Objective(**{**FKL, "k": 3}, name="narrow")))
    (why,) = sent.needs_hidden(topk=True)
    assert why.startswith("terms.narrow.k=3, where it answers once for all terms, with 4")
    warm = dict(PG, support="sampled", name="warm", teacher_temperature=2.0)
    (why,) = Total((Objective("sampled", **PG), Objective(**warm))).needs_hidden(topk=False)
    assert why.startswith("terms.warm.teacher_temperature=2, where it answers once")


def test_a_term_that_asks_nobody_gets_nobody():
    """And a model that a term does ask is missed by the name of its section."""
    total = Total((Objective(**CE), Objective(k=4, name="kd")))
    hidden, head = PROBLEM.student.hidden, head_of(PROBLEM.student)
    teacher = scores_of(PROBLEM, total.lead, "hidden", head_of(PROBLEM.teacher))
    total(hidden, head, batch_of(PROBLEM), teacher)
    with pytest.raises(ValueError, match=r"teacher: got none, but terms.kd.divergence=reverse_kl"):
        total(hidden, head, batch_of(PROBLEM))
    rewards = Objective(**OUTCOME)
    with pytest.raises(ValueError, match="reward: these responses have none"):
        rewards(hidden, head, batch_of(PROBLEM, reward_N=None, advantage_N=None))
