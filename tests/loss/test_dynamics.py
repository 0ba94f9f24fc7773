"""Metrics against sets and numbers worked out by hand, and where they are measured."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_opd.loss import Objective
from tests.distributed import run_ranks
from tests.loss.dense import judge, logits_problem, make_problem


def values(got):
    """Return the means and maxima of one call."""
    means = {name: (total / count).item() for name, (total, count) in got["means"].items()}
    return means | {name: value.item() for name, value in got["maxima"].items()}


def measure(student, teacher, k=2, payload="hidden", **options):
    """Return the metrics of one token, whose two distributions are given as probabilities."""
    rows = [torch.tensor(x, dtype=torch.float64).log()[None] for x in (student, teacher)]
    problem = replace(
        logits_problem(*rows), rollout_logp=torch.tensor([math.log(0.25)], dtype=torch.float64)
    )
    got = judge(problem, Objective(**{"support": "full", "k": k, **options}), payload=payload)
    return {name.removeprefix("distill/"): value for name, value in values(got).items()}


def is_close(got, **wanted):
    for name, value in wanted.items():
        assert math.isclose(got[name], value, rel_tol=1e-12, abs_tol=1e-14), (name, got[name])


def test_partial_overlap():
    got = measure([0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.25, 0.05])  # {0, 1} and {1, 2}
    is_close(got, overlap_ratio=0.5, overlap_mass_student=0.3, overlap_mass_teacher=0.6)
    is_close(got, overlap_empty=0, top1_agreement=0)
    is_close(got, overlap_advantage=0)  # renormalised on one entry both models agree
    is_close(got, tail_mass_student=0.3, tail_mass_teacher=0.3)


def test_empty_overlap_contributes_zero_and_is_counted():
    got = measure([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4])  # {0, 1} and {3, 2}
    is_close(got, overlap_ratio=0, overlap_empty=1, overlap_advantage=0)
    is_close(got, overlap_mass_student=0, overlap_mass_teacher=0)


def test_rewards_are_of_the_vocabulary_and_weighed_on_the_top_k():
    """{0, 1} and {1, 2}: p̄ = 4/7, 3/7; for what only the teacher has, .4, .3, .2 out of .9."""
    got = measure([0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.25, 0.05])
    is_close(got, overlap_reward=3 / 7 * math.log(2), student_only_reward=4 / 7 * math.log(1 / 4))
    is_close(got, teacher_only_reward=2 / 9 * math.log(0.25 / 0.2))
    for which in ("max", "min"):
        shared = {f"{which}_reward": 3 / 7 * math.log(2), f"{which}_reward_p": 0.3}
        is_close(got, **shared, **{f"{which}_reward_q": 0.6})


def test_extremes_are_of_the_overlap():
    """{0, 1, 2} and {0, 1, 3}; entry 2 has the lowest reward of all, but the student has it alone.

    p̄ = 4, 3, 2 of 9; q/p = 3/2, 2/3, 1/20.
    """
    got = measure([0.4, 0.3, 0.2, 0.1], [0.6, 0.2, 0.01, 0.19], k=3)
    is_close(got, max_reward=4 / 9 * math.log(3 / 2), max_reward_p=0.4, max_reward_q=0.6)
    is_close(got, min_reward=3 / 9 * math.log(2 / 3), min_reward_p=0.3, min_reward_q=0.2)
    is_close(got, student_only_reward=2 / 9 * math.log(1 / 20))
    assert got["student_only_reward"] < got["min_reward"]


def judge_rows(student, teacher, **options):
    """Return (total, count) of the metrics of several tokens, given as probabilities."""
    rows = [torch.tensor(x, dtype=torch.float64).log() for x in (student, teacher)]
    return judge(logits_problem(*rows), Objective(**{"support": "full", "k": 2, **options}))[
        "means"
    ]


def test_means_of_entries_are_no_means_of_tokens():
    """Overlaps of two, one and no entries: r = ¾·log ⅔, ¼·log 2; 3/7·log 2; nothing."""
    student = [[0.6, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]]
    teacher = [[0.4, 0.4, 0.1, 0.1], [0.1, 0.6, 0.25, 0.05], [0.1, 0.2, 0.3, 0.4]]
    got = judge_rows(student, teacher)
    total = 3 / 4 * math.log(2 / 3) + (1 / 4 + 3 / 7) * math.log(2)
    wanted = {
        "overlap_reward": (total, 3),
        "overlap_mass_student_nonempty": (0.8 + 0.3, 2),
        "overlap_mass_teacher_nonempty": (0.8 + 0.6, 2),
        "overlap_mass_student": (0.8 + 0.3, 3),
        "max_reward_p": (0.2 + 0.3, 2),
        "min_reward_p": (0.6 + 0.3, 2),
    }
    for name, pair in wanted.items():
        assert tuple(map(float, got[f"distill/{name}"])) == pytest.approx(pair, rel=1e-12), name
    assert int(got["distill/student_only_reward"][1]) == 3
    assert int(got["distill/teacher_only_reward"][1]) == 3


def test_parts_that_are_empty_are_means_over_nothing():
    far = judge_rows([[0.4, 0.3, 0.2, 0.1]], [[0.1, 0.2, 0.3, 0.4]])
    for name in ("overlap_reward", "overlap_mass_student_nonempty", "max_reward", "min_reward_q"):
        assert tuple(map(float, far[f"distill/{name}"])) == (0, 0), name
    same = judge_rows([[0.4, 0.3, 0.2, 0.1]], [[0.3, 0.4, 0.2, 0.1]])
    for name in ("student_only_reward", "teacher_only_reward"):
        assert tuple(map(float, same[f"distill/{name}"])) == (0, 0), name


def dense_parts(problem, k):
    """Return the same from sets of ids and the whole table of logits, token by token."""
    logp, logq = (m.logits().log_softmax(-1).tolist() for m in (problem.student, problem.teacher))
    found = {}

    def add(name, value):
        found.setdefault(f"distill/{name}", []).append(value)

    for s, t, supervised in zip(logp, logq, problem.mask.tolist(), strict=True):
        best_s, best_t = (sorted(range(len(x)), key=x.__getitem__)[-k:] for x in (s, t))
        shared = set(best_s) & set(best_t)
        if not supervised:
            continue

        def reward(i, support, s=s, t=t):
            return math.exp(s[i]) / sum(math.exp(s[j]) for j in support) * (t[i] - s[i])

        parts = {i: reward(i, best_s) for i in best_s}
        for i in best_s:
            add("overlap_reward" if i in shared else "student_only_reward", parts[i])
        for i in set(best_t) - shared:
            add("teacher_only_reward", reward(i, set(best_s) | set(best_t)))
        if shared:
            add("overlap_mass_student_nonempty", sum(math.exp(s[i]) for i in shared))
            add("overlap_mass_teacher_nonempty", sum(math.exp(t[i]) for i in shared))
            for which, choose in (("max", max), ("min", min)):
                i = choose(shared, key=parts.__getitem__)
                add(f"{which}_reward", parts[i])
                add(f"{which}_reward_p", math.exp(s[i]))
                add(f"{which}_reward_q", math.exp(t[i]))
    return {name: (sum(values), len(values)) for name, values in found.items()}


def parts_on_a_rank(rank, problem, widths):
    return judge(problem, Objective(k=4), rank=rank, widths=widths, group=dist.group.WORLD)["means"]


def test_parts_agree_with_sets_of_ids_at_every_tensor_parallel_size():
    problem = make_problem(lengths=(9, 7, 2))
    dense = dense_parts(problem, 4)
    assert len(dense) == 11
    assert 0 < dense["distill/max_reward"][1] < problem.mask.sum()  # one overlap is empty
    answers = [judge(problem, Objective(k=4))["means"]]
    answers += run_ranks(parts_on_a_rank, 2, problem, (7, 7))
    answers += run_ranks(parts_on_a_rank, 4, problem, (4, 4))
    for got in answers:
        for name, pair in dense.items():
            assert tuple(map(float, got[name])) == pytest.approx(pair, rel=1e-9), name


def test_full_overlap_and_support_kl():
    got = measure([0.6, 0.2, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1])  # {0, 1} both; ¾, ¼ against ½, ½
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    is_close(got, overlap_ratio=1, support_kl=kl, overlap_advantage=-kl / 2, top1_agreement=1)
    is_close(got, overlap_mass_student=0.8, overlap_mass_teacher=0.8)
    is_close(got, support_forward_kl=0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    is_close(got, extreme_gap=0.2)  # ¾ · log 1.5 against ¼ · log 2: the first, .6 − .4


def test_entropies_and_divergences():
    got = measure([0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25])
    ln2 = math.log(2)
    is_close(got, **{"student/entropy": 1.75 * ln2, "teacher/entropy": 2 * ln2})
    is_close(got, entropy_gap=0.25 * ln2, reverse_kl=0.25 * ln2, forward_kl=0.25 * ln2)
    is_close(got, **{"student/nll": ln2, "teacher/nll": 2 * ln2})


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


def fraction_of(problem, **options):
    """Return the (tokens, supervised tokens) of a correction where the metrics look at none."""
    nobody = torch.empty(0, dtype=torch.long)
    got = judge(problem, Objective(k=4, **options), measured_M=nobody)
    assert "policy/mismatch_kl" not in got["means"]
    return tuple(map(int, got["means"]["policy/corrected_fraction"]))


@pytest.mark.parametrize("chunk_tokens", [2, None])
@pytest.mark.parametrize(
    ("options", "acts"),
    [
        (dict(correction="tis"), 1),
        (dict(correction="tis", correction_high=1.8), 2),
        (dict(correction="icepop"), 2),
        (dict(correction="mask"), 2),
        (dict(correction="mask", correction_low=0.7), 3),
        (dict(correction="mask", support="sampled", form="policy_gradient"), 2),
    ],
    ids=str,
)
def test_the_corrected_fraction_is_of_all_supervised_tokens(options, acts, chunk_tokens):
    """π/μ = .4, .6, 1, 1.9, 2.5, and 9 where nothing is supervised."""
    problem = make_problem(lengths=(6,))
    logp = problem.student.logits().log_softmax(-1)[range(6), problem.target]
    ratio = torch.tensor([0.4, 9, 0.6, 1, 1.9, 2.5], dtype=torch.float64)
    problem = replace(problem, rollout_logp=logp - ratio.log())
    assert fraction_of(problem, chunk_tokens=chunk_tokens, **options) == (acts, 5)


def test_the_ratio_of_a_correction_is_taken_at_the_rollouts_temperature():
    problem, hot = make_problem(lengths=(6,)), 1.4
    logp = (problem.student.logits() / hot).log_softmax(-1)[range(6), problem.target]
    problem = replace(problem, rollout_logp=logp)
    narrow = dict(correction="mask", correction_low=0.999, correction_high=1.001)
    assert fraction_of(problem, rollout_temperature=hot, **narrow) == (0, 5)
    assert fraction_of(problem, **narrow) == (5, 5)


def test_without_a_correction_there_is_no_fraction():
    assert "policy/corrected_fraction" not in measure([0.5, 0.5], [0.5, 0.5])


def test_engines_ids_are_compared_with_the_trainers():
    """The top 3 of 5 are {0, 1, 2}; the engine said {2, 4, 0}."""
    p = [0.4, 0.3, 0.2, 0.07, 0.03]
    problem = logits_problem(*(torch.tensor([p], dtype=torch.float64).log() for _ in range(2)))
    problem = replace(problem, rollout_ids=torch.tensor([[2, 4, 0]]))
    got = values(judge(problem, Objective(support="rollout_topk", k=3)))
    is_close(got, **{"policy/topk_mismatch": 1 / 3})


def test_what_a_small_payload_lets_us_see():
    got = measure([0.4, 0.3, 0.3], [0.1, 0.6, 0.3], payload="topk", support="teacher_topk")
    is_close(got, overlap_ratio=0.5, top1_agreement=0)
    assert "reverse_kl" not in got and "teacher/nll" not in got
    sampled = dict(payload="sampled", support="sampled", form="policy_gradient")
    got = measure([0.4, 0.3, 0.3], [0.1, 0.6, 0.3], **sampled)
    is_close(got, **{"teacher/nll": -math.log(0.1)})
    assert "overlap_ratio" not in got


SUPPORTS = ("student_topk", "teacher_topk", "rollout_topk", "intersection", "full", "sampled")


@pytest.mark.parametrize("chunk_tokens", [2, None])
@pytest.mark.parametrize("support", SUPPORTS)
def test_metrics_of_some_tokens_are_the_means_of_those(support, chunk_tokens):
    """Whether the loss has their logits anyway or they are made for it; whatever the loss is."""
    options = dict(form="policy_gradient") if support == "sampled" else {}
    problem, k = make_problem(), 4
    objective = Objective(support=support, k=k, chunk_tokens=chunk_tokens, **options)
    index = torch.tensor([0, 3, 4, 6])
    got = values(judge(problem, objective, measured_M=index))
    rows = ("target", "mask", "rollout_logp", "position", "sequence", "rollout_ids")
    part = replace(problem, **{name: getattr(problem, name)[index] for name in rows})
    models = ("student", "teacher", "base")
    cut = {
        n: replace(getattr(problem, n), hidden=getattr(problem, n).hidden[index]) for n in models
    }
    want = values(
        judge(replace(part, **cut), Objective(support="full", k=k), measured_M=torch.arange(4))
    )
    assert len(want) > 15
    for name in want:
        if not name.startswith("loss/"):
            assert math.isclose(got[name], want[name], rel_tol=1e-9, abs_tol=1e-12), name


def test_nothing_is_measured_where_nobody_asks():
    got = judge(make_problem(), Objective(k=4), measured_M=torch.empty(0, dtype=torch.long))
    assert set(got["means"]) == {"loss/objective", "distill/support_empty"} and not got["maxima"]


def on_a_rank(rank, problem, objective):
    return values(judge(problem, objective, rank=rank, widths=(4, 4), group=dist.group.WORLD))


def test_metrics_do_not_depend_on_the_ranks():
    problem = make_problem()
    for support in ("rollout_topk", "full"):
        objective = Objective(support=support, k=4, correction="icepop")
        alone = values(judge(problem, objective))
        for got in run_ranks(on_a_rank, 4, problem, objective):
            assert got.keys() == alone.keys()
            for name, value in alone.items():
                assert math.isclose(got[name], value, rel_tol=1e-9, abs_tol=1e-12), name


def test_buckets_of_positions_share_out_the_tokens():
    """Responses of 4, 3 (and an unsupervised 2) tokens in buckets of 2; the first one's second
    token is not supervised either."""
    problem = make_problem()
    objective = Objective(k=4, correction="mask", position_bucket=2, max_tokens=4)
    got = judge(problem, objective)
    for name in ("student/nll", "distill/overlap_ratio", "policy/corrected_fraction"):
        total, count = got["means"][name]
        parts = [got["means"][f"{name}@{first}"] for first in (0, 2)]
        assert [int(part[1]) for part in parts] == [3, 3] and int(count) == 6
        torch.testing.assert_close(sum(part[0] for part in parts), total)
    entries = torch.zeros(2)  # every entry of the student's top k is the overlap's or its alone
    for name in ("distill/overlap_reward", "distill/student_only_reward"):
        parts = [got["means"][f"{name}@{first}"] for first in (0, 2)]
        torch.testing.assert_close(sum(part[0] for part in parts), got["means"][name][0])
        entries += torch.tensor([part[1] for part in parts])
    assert entries.tolist() == [3 * 4, 3 * 4]


def test_a_token_without_supervision_is_in_no_metric():
    problem = make_problem()
    outlier = problem.rollout_logp.clone()
    outlier[1] = -50.0
    assert problem.mask[1] == 0
    everyone = torch.arange(len(problem.mask))
    with_it = judge(replace(problem, rollout_logp=outlier), Objective(k=4), measured_M=everyone)
    without = judge(problem, Objective(k=4), measured_M=everyone)
    assert values(with_it) == values(without)
