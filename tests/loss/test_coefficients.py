"""What the literature says of gradients: coefficients on log p, and identities between objectives.

Logits are the hidden states of an identity head, so that their gradient is the logits'.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.loss import Objective, supports
from tests.loss.dense import far, judge, logits_problem

PG = dict(form="policy_gradient")
V, K, Y = 7, 3, 2
Z, Z_TEACHER, Z_BASE = torch.randn(
    3, V, generator=torch.Generator().manual_seed(8), dtype=torch.float64
)
B, LAMBDA, ADVANTAGE = 0.3, 1.25, 0.7
LOG_MU = (Z.log_softmax(-1)[Y] - 0.3).item()  # the engine found the drawn token less likely


def token(z=Z):
    """Return everything the table's formulas speak of, as functions of the student's logits."""
    s, t, b = (x.log_softmax(-1) for x in (z, Z_TEACHER, Z_BASE))
    p, q, d = s.exp(), t.exp(), s - t
    y, S, T = (torch.zeros(V).double() for _ in range(3))
    y[Y], S[Z.topk(K).indices], T[Z_TEACHER.topk(K).indices] = 1, 1, 1
    return SimpleNamespace(s=s, t=t, b=b, p=p, q=q, d=d, y=y, S=S, T=T, kl=(p * d).sum())


def renormalised(x, inside):
    return x * inside / (x * inside).sum()


def sum_of(a, b, inside=1.0):
    """Return Σ a·log(a / b) on a set, where entries outside are 0 in both."""
    return (inside * a * ((a + (a == 0)).log() - (b + (b == 0)).log())).sum()


def tail(x, inside):
    return (x * (1 - inside)).sum()


def mixture(x, inside=1.0):
    """Return r = (1 − β) log(p / M) and the JSD, of the entries renormalised on a set."""
    p, q = renormalised(x.p, inside), renormalised(x.q, inside)
    m = B * q + (1 - B) * p
    r = (1 - B) * ((p + (p == 0)).log() - (m + (m == 0)).log())
    return p, r, B * sum_of(q, m) + (1 - B) * sum_of(p, m)


def centred(p, r):
    return p * (r - (p * r).sum())


def veto(x):
    """Return the target Q ∝ q·p^β, of the student as it is now."""
    return (x.t + B * token().s).softmax(-1)


def anti_sd(s, t):
    return 0.5 * LAMBDA * (torch.nn.functional.softplus(t - s) - math.log(2))


def ratio(x):
    """Return π/μ of the token that was drawn."""
    return (x.s[Y] - LOG_MU).exp()


DRAWN = dict(support="sampled")
STUDENT = dict(support="student_topk", normalize="vocab")
TEACHER = dict(support="teacher_topk", normalize="vocab")
FULL = dict(support="full")
# name → (options, D as a function of the logits or None where Σ sg[c]·log p is all there is, c)
TABLE = {
    "SFT": (dict(DRAWN, divergence="cross_entropy"), lambda x: -x.s[Y], lambda x: -x.y),
    "sampled RKL PG": (dict(DRAWN, **PG), None, lambda x: x.d * x.y),
    "vOPD baseline": (dict(DRAWN, **PG, baseline="kl"), None, lambda x: (x.d - x.kl) * x.y),
    "k2 direct": (
        dict(DRAWN, estimator="k2"),
        lambda x: x.d[Y] ** 2 / 2,
        lambda x: x.d * x.y,
    ),
    "k3 direct": (
        dict(DRAWN, estimator="k3"),
        lambda x: (-x.d[Y]).exp() - 1 + x.d[Y],
        lambda x: (1 - (-x.d).exp()) * x.y,
    ),
    "FKL full": (
        dict(FULL, divergence="forward_kl"),
        lambda x: sum_of(x.q, x.p),
        lambda x: -x.q,
    ),
    "FKL teacher top-k": (
        dict(TEACHER, divergence="forward_kl"),
        lambda x: sum_of(x.q, x.p, x.T),
        lambda x: -x.q * x.T,
    ),
    "FKL teacher top-k renormalised": (
        dict(TEACHER, divergence="forward_kl", normalize="support"),
        lambda x: sum_of(renormalised(x.q, x.T), renormalised(x.p, x.T)),
        lambda x: renormalised(x.p, x.T) - renormalised(x.q, x.T),
    ),
    "FKL top-k + tail": (
        dict(STUDENT, divergence="forward_kl", tail=True),
        lambda x: sum_of(x.q, x.p, x.S) + sum_of(tail(x.q, x.S), tail(x.p, x.S)),
        lambda x: x.S * (-x.q + x.p * tail(x.q, x.S) / tail(x.p, x.S)),
    ),
    "RKL full": (FULL, lambda x: x.kl, lambda x: x.p * x.d),
    "RKL top-k truncated": (
        STUDENT,
        lambda x: sum_of(x.p, x.q, x.S),
        lambda x: x.S * x.p * (x.d + 1),
    ),
    "RKL top-k renormalised": (
        dict(STUDENT, normalize="support"),
        lambda x: sum_of(renormalised(x.p, x.S), renormalised(x.q, x.S)),
        lambda x: centred(renormalised(x.p, x.S), x.d),
    ),
    "thunlp": (dict(STUDENT, **PG), None, lambda x: renormalised(x.p, x.S) * x.d),
    "RKL top-k + tail": (
        dict(STUDENT, tail=True),
        lambda x: sum_of(x.p, x.q, x.S) + sum_of(tail(x.p, x.S), tail(x.q, x.S)),
        lambda x: x.S * x.p * (x.d - (tail(x.p, x.S) / tail(x.q, x.S)).log()),
    ),
    "JSD full": (
        dict(FULL, divergence="jsd", jsd_beta=B),
        lambda x: mixture(x)[2],
        lambda x: x.p * mixture(x)[1],
    ),
    "JSD top-k renormalised": (
        dict(STUDENT, divergence="jsd", jsd_beta=B, normalize="support"),
        lambda x: mixture(x, x.S)[2],
        lambda x: centred(*mixture(x, x.S)[:2]),
    ),
    "Veto-RKL": (
        dict(FULL, veto=B),
        lambda x: sum_of(x.p, veto(x)),
        lambda x: x.p * ((1 - B) * x.s - x.t),
    ),
    "Veto-FKL": (
        dict(FULL, veto=B, divergence="forward_kl"),
        lambda x: sum_of(veto(x), x.p),
        lambda x: -veto(x),
    ),
    "Veto PG": (dict(DRAWN, **PG, veto=B), None, lambda x: ((1 - B) * x.s - x.t) * x.y),
    "skew-KL": (
        dict(FULL, divergence="skew_kl", skew_alpha=B),
        lambda x: sum_of(x.q, B * x.q + (1 - B) * x.p),
        lambda x: -x.q * (1 - B) * x.p / (B * x.q + (1 - B) * x.p),
    ),
    "AntiSD": (dict(DRAWN, **PG, divergence=anti_sd), None, lambda x: anti_sd(x.s, x.t) * x.y),
    "ExOPD": (
        dict(DRAWN, **PG, extrapolation=LAMBDA),
        None,
        lambda x: (x.s - x.b - LAMBDA * (x.t - x.b)) * x.y,
    ),
    "GRPO": (dict(DRAWN, **PG, divergence="outcome"), None, lambda x: -ADVANTAGE * x.y),
    "plus_grpo": (
        dict(DRAWN, **PG, outcome=0.4),
        None,
        lambda x: (x.d - 0.4 * ADVANTAGE) * x.y,
    ),
    "token_grpo": (
        dict(DRAWN, **PG, group_normalize="std", discount=1.0),
        None,
        lambda x: -ADVANTAGE * x.y,
    ),
    "PPO": (
        dict(DRAWN, **PG, divergence="outcome", clip_low=0.9, clip_high=0.9),
        lambda x: -ratio(x) * ADVANTAGE,
        lambda x: -ratio(x) * ADVANTAGE * x.y,
    ),
    "PPO, clipped": (
        dict(DRAWN, **PG, divergence="outcome", clip_low=0.1, clip_high=0.1),
        lambda x: x.s.sum() * 0 - 1.1 * ADVANTAGE,
        lambda x: 0 * x.y,
    ),
    "RLSD": (
        dict(DRAWN, **PG, divergence="outcome", weights={"rlsd": dict(share=B, eps=9.0)}),
        None,
        lambda x: -ADVANTAGE * ((1 - B) + B * (-x.d[Y]).exp()) * x.y,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_gradient_is_the_slope_of_the_literal_loss(name):
    """Central differences of D, or of Σ sg[c]·log p, in the student's logits; and c itself."""
    options, literal, coefficient = TABLE[name]
    problem = logits_problem(Z[None], Z_TEACHER[None], Z_BASE[None], Y)
    one = torch.ones(1, dtype=torch.float64)
    problem = replace(problem, advantage=ADVANTAGE * one, rollout_logp=LOG_MU * one)
    got = judge(problem, Objective(**options, k=K))
    now, step = token(), 1e-5
    c = coefficient(now)
    literal = literal or (lambda x: (c * x.s).sum())
    slopes = [
        (literal(token(Z + step * e)) - literal(token(Z - step * e))) / (2 * step)
        for e in torch.eye(V, dtype=torch.float64)
    ]
    assert far(got["hidden"][0], torch.stack(slopes)) < 1e-8
    assert far(got["hidden"][0], c - now.p * c.sum()) < 1e-12
    if TABLE[name][1]:
        assert far(got["loss"], literal(now)) < 1e-12


# Identities


def random_logits(seed, n=6, v=V):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, v, generator=g, dtype=torch.float64) * 2


SETS = ("student_topk", "rollout_topk", "teacher_topk", "intersection", "union")
KULLBACK = ({}, dict(divergence="forward_kl"), dict(divergence="skew_kl"))
DIVERGENCES = (*KULLBACK, dict(divergence="jsd"), dict(divergence="jsd", jsd_rescale=True))
seeds = given(seed=st.integers(0, 999))
few = settings(max_examples=15, deadline=None, derandomize=True)


def alike():
    """Return every objective whose gradient vanishes where student and teacher agree.

    A KL that is cut off at k without a tail is not among them: its gradient there is
    p·(1[v∈S] − p(S)), which gives S all the mass there is.
    """
    for support in (*SETS, "union-intersection"):
        for form in (
            *DIVERGENCES,
            PG,
            dict(PG, reward_weight="none"),
            dict(PG, center_on_support=True),
        ):
            yield dict(form, support=support)
            if "form" not in form:
                yield dict(form, support=support, normalize="vocab", tail=True)
            if "form" in form or form.get("divergence") == "jsd":
                yield dict(form, support=support, normalize="vocab")
    for form in (*DIVERGENCES, PG, dict(PG, reward_weight="none")):
        yield dict(form, support="full")
    for form in (dict(estimator="k2"), dict(estimator="k3"), PG, dict(PG, baseline="kl")):
        yield dict(form, support="sampled")


@pytest.mark.parametrize("options", list(alike()), ids=str)
def test_student_and_teacher_alike_have_no_loss_and_no_gradient(options):
    problem = logits_problem(*random_logits(0)[[0, 0]], y=2)
    got = judge(problem, Objective(**options, k=3))
    assert abs(got["loss"]) < 1e-14 and got["hidden"].abs().max() < 1e-14


@pytest.mark.parametrize("normalize", ["support", "vocab", "tail"])
@pytest.mark.parametrize("support", SETS)
def test_a_support_of_the_whole_vocabulary_is_full(support, normalize):
    """And then nothing depends on how one normalises, on a tail, on the form or on centring."""
    problem = logits_problem(*random_logits(1))
    problem = replace(problem, rollout_ids=torch.arange(V).flip(0).expand(6, V))
    full = judge(problem, Objective(support="full", k=V))
    tail = normalize == "tail"
    options = dict(support=support, normalize="vocab" if tail else normalize, tail=tail, k=V)
    forms = [{}]
    if not tail:
        forms += [PG, dict(PG, center_on_support=True)]
    if normalize == "vocab":
        forms += [dict(PG, reward_weight_normalize=False)]
    for form in forms:
        got = judge(problem, Objective(**options, **form))
        assert far(got["hidden"], full["hidden"]) < 1e-12, form
        assert "center_on_support" in form or far(got["loss"], full["loss"]) < 1e-12, form


@pytest.mark.parametrize(
    ("drawn", "divergence"),
    [
        (PG, "reverse_kl"),
        (dict(PG, baseline="kl"), "reverse_kl"),
        (dict(PG, baseline="topk_kl"), "reverse_kl"),
        (dict(estimator="k2"), "reverse_kl"),
        (dict(estimator="k3"), "forward_kl"),
    ],
    ids=str,
)
def test_expectation_of_a_sampled_objective(drawn, divergence):
    """One token for every entry v, weighted by p(v): the gradient is that of the divergence."""

    def probability(student_logp_N):
        return student_logp_N.exp()

    student, teacher = random_logits(2, n=1)
    draws = replace(
        logits_problem(student.expand(V, V), teacher.expand(V, V)), target=torch.arange(V)
    )
    mean = judge(draws, Objective(support="sampled", k=3, weights={probability: {}}, **drawn))
    full = judge(
        logits_problem(student, teacher), Objective(support="full", k=3, divergence=divergence)
    )
    assert far(mean["hidden"].sum(0), full["hidden"][0]) < 1e-12


@few
@seeds
def test_thunlps_surrogate_is_equation_5_and_a_push_of_all_mass_into_the_support(seed):
    """Σ p̄d·∇log p = ∇KL(p̄‖q̄) + m·∇log Z with m = Σ p̄d and Z = p(S); centred it is Eq. 5."""
    student, teacher = random_logits(seed)
    problem = logits_problem(student, teacher)
    eq5 = judge(problem, Objective(k=K))["hidden"]
    thunlp = Objective(k=K, normalize="vocab", **PG)
    z = student.clone().requires_grad_()
    s, ids = z.log_softmax(-1), student.topk(K).indices
    d = (s - teacher.log_softmax(-1)).gather(-1, ids).detach()
    m = (s.gather(-1, ids).softmax(-1).detach() * d).sum(-1)
    (m * s.gather(-1, ids).logsumexp(-1)).sum().backward()
    assert far(judge(problem, thunlp)["hidden"], eq5 + z.grad) < 1e-12
    centred_ = judge(problem, replace(thunlp, center_on_support=True))["hidden"]
    assert far(centred_, eq5) < 1e-12


@few
@given(data=st.data(), k=st.integers(1, 5), y=st.integers(0, 7))
def test_sets_are_sets(data, k, y):
    """Of a token's k best of both models: union, intersection and what exactly one has."""
    mine, theirs = (data.draw(st.permutations(range(8)))[:k] for _ in range(2))

    def chosen(support, *ids):
        ids_1K, valid_1K = support(*(torch.tensor([x]) for x in ids))
        found = ids_1K[valid_1K].tolist()
        assert len(found) == len(set(found)), "an entry twice"
        return set(found)

    union = chosen(supports.union, mine, theirs)
    intersection = chosen(supports.intersection, mine, theirs)
    only_one = chosen(supports.union_intersection, mine, theirs)
    assert union == {*mine, *theirs} and intersection == {*mine} & {*theirs}
    assert intersection | only_one == union and not intersection & only_one
    ids_1K, valid_1K = supports.intersection(torch.tensor([mine]), torch.tensor([theirs]))
    appended = supports.append(ids_1K, valid_1K, torch.tensor([y]))
    assert chosen(lambda: appended) == intersection | {y}


@few
@given(seed=st.integers(0, 999), k=st.integers(1, V), data=st.data())
def test_a_divergence_with_its_tail_is_one(seed, k, data):
    """Never negative, and never more than that of the whole vocabulary, of which it is a coarser
    view; without the tail it is none."""
    problem = logits_problem(*random_logits(seed, n=1))
    form = data.draw(st.sampled_from(DIVERGENCES[:4]))
    support = data.draw(st.sampled_from(["student_topk", "teacher_topk", "union"]))
    options = dict(form, support=support, normalize="vocab", tail=True, k=k)
    whole = judge(problem, Objective(**form, support="full", k=k))["loss"]
    assert -1e-14 <= judge(problem, Objective(**options))["loss"] <= whole + 1e-14


def test_a_truncated_kl_may_be_negative():
    rows = [[[0.4, 0.1, 0.3, 0.2]], [[0.6, 0.3, 0.05, 0.05]]]
    problem = logits_problem(*torch.tensor(rows, dtype=torch.float64).log())
    truncated = Objective(support="teacher_topk", k=2, normalize="vocab")
    want = 0.4 * math.log(0.4 / 0.6) + 0.1 * math.log(0.1 / 0.3)
    assert math.isclose(judge(problem, truncated)["loss"], want, rel_tol=1e-12) and want < 0
    assert judge(problem, replace(truncated, tail=True))["loss"] > 0


@few
@given(seed=st.integers(0, 999), support=st.sampled_from(["student_topk", "full"]))
def test_rescaled_jsd_goes_from_forward_to_reverse_kl(seed, support):
    problem = logits_problem(*random_logits(seed) / 4)  # far apart, the limit is slow
    for beta, near, divergence in ((0.0, 1e-7, "forward_kl"), (1.0, 1 - 1e-7, "reverse_kl")):
        kl = judge(problem, Objective(support=support, k=K, divergence=divergence))
        for b, tolerance in ((beta, 1e-12), (near, 1e-4)):
            jsd = Objective(support=support, k=K, divergence="jsd", jsd_beta=b, jsd_rescale=True)
            got = judge(problem, jsd)
            for name in ("loss", "hidden"):
                assert far(got[name], kl[name]) < tolerance, (name, b)


def test_veto_and_exopd_have_the_fixed_points_of_the_papers():
    """p = q^{1/(1−β)} for Veto, p = b^{1−λ}·q^λ for ExOPD, both normalised: no gradient there."""
    base, teacher = random_logits(3)
    veto = judge(logits_problem(teacher / (1 - B), teacher), Objective(support="full", veto=B, k=K))
    mixed = LAMBDA * teacher.log_softmax(-1) + (1 - LAMBDA) * base.log_softmax(-1)
    extrapolated = Objective(support="full", extrapolation=LAMBDA, k=K)
    exopd = judge(logits_problem(mixed, teacher, base), extrapolated)
    for got in (veto, exopd):
        assert abs(got["loss"]) < 1e-13 and got["hidden"].abs().max() < 1e-13
