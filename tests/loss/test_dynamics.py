"""Metrics against sets and numbers worked out by hand; test_objective compares them with dense."""

import math
from dataclasses import replace

import torch

from megatron_opd.loss import Objective
from tests.loss.dense import judge, make_problem


def measure(student, teacher, k=2, **options):
    """Return the metrics of one token, whose two distributions are given as probabilities."""
    v = len(student)
    rows = [torch.tensor(x, dtype=torch.float64).log()[None] for x in (student, teacher)]
    problem = replace(
        make_problem(n=1, v=v),
        hidden=rows[0],  # with the identity for a head, hidden states are logits
        teacher_hidden=rows[1],
        weight=torch.eye(v, dtype=torch.float64),
        teacher_weight=torch.eye(v, dtype=torch.float64),
        target=torch.tensor([0]),
        token_weight=torch.ones(1, dtype=torch.float64),
        rollout_logp=torch.tensor([math.log(0.25)], dtype=torch.float64),
    )
    got = judge(problem, Objective(support="full", k=k, **options))
    values = {**got["sums"], **got["maxima"]}
    return {name.removeprefix("distill/"): value.item() for name, value in values.items()}


def is_close(got, **wanted):
    for name, value in wanted.items():
        assert math.isclose(got[name], value, rel_tol=1e-12, abs_tol=1e-14), (name, got[name])


def test_partial_overlap():
    got = measure([0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.25, 0.05])  # {0, 1} and {1, 2}
    is_close(got, overlap_ratio=0.5, overlap_mass_student=0.3, overlap_mass_teacher=0.6)
    is_close(got, overlap_empty=0, top1_agreement=0)
    is_close(got, overlap_advantage=0)  # renormalised on one entry both models agree


def test_empty_overlap_contributes_zero_and_is_counted():
    got = measure([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4])  # {0, 1} and {3, 2}
    is_close(got, overlap_ratio=0, overlap_empty=1, overlap_advantage=0)
    is_close(got, overlap_mass_student=0, overlap_mass_teacher=0)


def test_full_overlap_and_support_kl():
    got = measure([0.6, 0.2, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1])  # {0, 1} both; ¾, ¼ against ½, ½
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    is_close(got, overlap_ratio=1, support_kl=kl, overlap_advantage=-kl / 2, top1_agreement=1)
    is_close(got, overlap_mass_student=0.8, overlap_mass_teacher=0.8)


def test_entropies_and_reverse_kl():
    got = measure([0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25])
    ln2 = math.log(2)
    is_close(got, **{"student/entropy": 1.75 * ln2, "teacher/entropy": 2 * ln2})
    is_close(got, entropy_gap=0.25 * ln2, reverse_kl=0.25 * ln2)
    is_close(got, **{"student/nll": ln2, "teacher/nll": 2 * ln2, "tokens": 1})


def test_mismatch_with_the_rollout_engine():
    """π(0) = ½ where the engine said ¼: Δ = ln 2, k3 = 2 − 1 − ln 2."""
    got = measure([0.5, 0.25, 0.125, 0.125], [0.25] * 4)
    is_close(got, **{"policy/mismatch_kl": 1 - math.log(2), "policy/mismatch_max": math.log(2)})


def test_mismatch_is_taken_at_the_rollouts_temperature():
    """At T = ½, p² renormalised: 0.25 / (0.25 + 0.0625 + 2 · 0.015625) = 8 / 11."""
    got = measure([0.5, 0.25, 0.125, 0.125], [0.25] * 4, rollout_temperature=0.5)
    is_close(got, **{"policy/mismatch_max": math.log(8 / 11 / 0.25)})
    is_close(got, **{"student/nll": math.log(2)})


def test_engines_mismatch_is_not_measured_where_no_engine_drew():
    got = measure([0.5, 0.5], [0.5, 0.5], rollout_temperature=None)
    assert not any(name.startswith("policy/") for name in got)


def test_a_token_of_weight_zero_is_in_no_metric():
    problem = make_problem()
    outlier = problem.rollout_logp.clone()
    outlier[3] = -50.0
    assert problem.token_weight[3] == 0
    objective = Objective(k=4)
    with_it = judge(replace(problem, rollout_logp=outlier), objective)
    without = judge(problem, objective)
    assert with_it["sums"] == without["sums"] and with_it["maxima"] == without["maxima"]
