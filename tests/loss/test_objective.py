"""Every objective against the dense float64 reference, and against what is known of it on paper.

Value and gradients on 1, 2 and 4 ranks; the coefficients of the literature by finite differences;
identities; what is refused; what is communicated, kept and made.
"""

import functools
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist

from megatron_opd.loss import Objective, supports
from megatron_opd.types import HiddenScores
from tests.distributed import run_ranks
from tests.loss.dense import (
    Network,
    batch_of,
    far,
    head_of,
    judge,
    logits_problem,
    make_problem,
    reference,
    scores_of,
)

SETS = (
    "student_topk",
    "teacher_topk",
    "rollout_topk",
    "intersection",
    "union",
    "union-intersection",
)
SHORT = (3, 2, 1)
PROBLEMS = (make_problem(0, SHORT), make_problem(1, SHORT, bias=True, softcap=4.0))
MEASURED = torch.tensor([2])  # which tokens the metrics look at is of no concern to the loss
# (student's rows a rank, teacher's) for 13 entries; some leave ranks with padding alone
WIDTHS = {1: [(13, 16), (15, 13)], 2: [(8, 7), (7, 14)], 4: [(4, 6), (7, 4)]}


def nameless(options) -> str:
    """Name a test without the addresses of functions, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(options))


def weighted_square(s, t):
    """A divergence of a user, with a value where s = t = 0."""
    return t.exp() * ((s - t) ** 2 + 0.1 * (s - 1.0))


def best_and_drawn(student_ids_CK, target_C):
    """A support of a user: the student's best two, and the response's token."""
    return supports.append(*supports.student_topk(student_ids_CK[:, :2]), target_C)


def by_student(student_logp_N, power=1.0):
    """A weight of a user."""
    return (power * student_logp_N).exp()


def against_the_engine(log_ratio_N):
    """A weight of a user that wants the engine's word."""
    return log_ratio_N.exp()


SUPPORTS = ("sampled", *SETS, best_and_drawn, "full")
DIVERGENCES = (
    dict(divergence="reverse_kl"),
    dict(divergence="forward_kl"),
    dict(divergence="jsd", jsd_beta=0.3),
    dict(divergence="jsd", jsd_beta=0.8, jsd_rescale=True),
    dict(divergence="skew_kl", skew_alpha=0.2),
    dict(divergence=weighted_square),
)
NORMALISATIONS = ({}, dict(normalize="vocab"), dict(normalize="vocab", tail=True))
PG = dict(form="policy_gradient")
REWARDS = (
    *(
        dict(PG, reward_weight=weight, reward_weight_normalize=normalize, center_on_support=center)
        for weight in ("student_p", "teacher_p", "none")
        for normalize in (True, False)
        for center in (False, True)
    ),
    dict(PG, divergence=weighted_square),
    dict(PG, baseline="kl", reward_floor=-1.0),
    dict(PG, baseline="topk_kl", reward_weight="teacher_p", reward_cap=0.2),
)
DRAWS = (
    dict(divergence="cross_entropy"),
    dict(estimator="k2"),
    dict(estimator="k3"),
    dict(divergence=weighted_square),
    dict(PG),
    dict(PG, estimator="k2", baseline="mean"),
    dict(PG, estimator="k3", reward_floor=-0.5),
    dict(PG, divergence=weighted_square),
    dict(PG, baseline="kl"),
    dict(PG, baseline="topk_kl", reward_cap=0.4),
    dict(PG, baseline="mean", discount=0.5),
    dict(PG, discount=1.0, reward_floor=-1.0, reward_cap=1.0),
    dict(PG, divergence="outcome"),
    dict(PG, outcome=0.7),
    dict(PG, outcome=-0.5, discount=0.5, reward_floor=-0.5, baseline="mean"),
    dict(PG, group_normalize="std", discount=1.0),
    dict(PG, group_normalize="mean"),
    dict(PG, divergence="outcome", clip_low=0.1, clip_high=0.2, dual_clip=1.3),
    dict(PG, outcome=0.5, clip_low=0.2, clip_high=0.28),
    dict(PG, divergence=weighted_square, dual_clip=1.2),
)
SQUARED = dict(student_temperature=1.5, teacher_temperature=0.8, temperature_squared=True)
# 13, a prime: a structure meets another of them on every support
EXTRAS = (
    {},
    dict(
        student_temperature=0.7,
        teacher_temperature=1.3,
        rollout_temperature=0.9,
        correction="mask",
        correction_high=1.2,
    ),
    SQUARED,
    dict(extrapolation=1.25),
    dict(SQUARED, veto=0.4, aggregation="seq-mean-token-sum"),
    dict(extrapolation=0.5, veto=0.2, student_temperature=1.2),
    dict(weights={"teacher_entropy_gate": dict(threshold=1.9), by_student: dict(power=0.5)}),
    dict(
        weights={"student_entropy_top": {}},
        correction="icepop",
        correction_low=0.6,
        correction_high=1.3,
    ),
    dict(
        SQUARED,
        aggregation="seq-mean-token-mean",
        weights={"prune_drift": dict(threshold=0.5, drop=0.2)},
    ),
    dict(SQUARED, aggregation="seq-mean-token-sum-norm", fixed_length=5, rollout_temperature=None),
    dict(
        student_temperature=1.2,
        rollout_temperature=0.9,
        weights={"sod_step": dict(step_tokens=2), "position_decay": dict(half_life=2.0)},
        correction="tis",
        correction_high=1.2,
    ),
    dict(weights={"correct_only": dict(threshold=-0.5), "rlsd": dict(share=0.7, eps=0.4)}),
    dict(weights={"incorrect_only": {}, "rollout_only": {}}, aggregation="seq-mean-token-mean"),
)


def structures(support):
    """Return the options of every objective on one support, temperatures and weights aside."""
    if support == "sampled":
        return [dict(options, support=support) for options in DRAWS]
    if support == "full":
        return [dict(options, support=support) for options in (*DIVERGENCES, *REWARDS)]
    return [
        dict(options, **norm, support=support)
        for options in (*DIVERGENCES, *REWARDS)
        for norm in NORMALISATIONS
        if not ("form" in options and "tail" in norm)
        and (options.get("reward_weight_normalize", True) or norm)  # p̄ is a weight already
    ]


def cases(support):
    """Yield (problem, objective, payload) of every structure, each with its share of the rest."""
    plain = {"teacher_topk": "topk", "sampled": "sampled"}.get(support)
    offset = 5 * SUPPORTS.index(support)  # the same structure has other extras on other supports
    for i, options in enumerate(structures(support)):
        extras = EXTRAS[(i + offset) % len(EXTRAS)]
        extras = fitting(options, extras)
        options = {**options, **extras, "k": 4}
        if support in SETS:
            options["append_sampled"] = i % 4 == 1
        objective = Objective(**options)
        yield PROBLEMS[i % 2], objective, plain if plain and served(objective) else "hidden"


def fitting(options, extras):
    """Return what of the extras does not contradict the options."""
    drawn = {"outcome", "group_normalize", "clip_low", "dual_clip"} & set(options)
    if options.get("divergence") == "cross_entropy":
        return {}
    if options.get("divergence") == "outcome" or "group_normalize" in options:
        extras = {k: v for k, v in extras.items() if k not in ("extrapolation", "veto")}
    if drawn:
        extras = {k: v for k, v in extras.items() if not k.startswith(("correction", "rollout_t"))}
        extras["rollout_temperature"] = extras.get("student_temperature", 1.0)
    return extras


def served(o):
    """Say whether a few log-probabilities will do: nothing else is asked of the teacher."""
    moved = o.extrapolation != 1 or o.veto
    return not (o.weights or o.append_sampled or o.baseline in ("kl", "topk_kl")) and (
        o.support == "sampled" or not moved
    )


@functools.cache
def expected(support):
    """Return the cases of a support and what each must give, once for all numbers of ranks."""
    return [(*case, reference(*case[:2])) for case in cases(support)]


def judge_all(rank, asked, world):
    group = dist.group.WORLD if world > 1 else None
    return [
        judge(problem, objective, rank=rank, group=group, **options)
        for problem, objective, options in asked
    ]


def on_ranks(asked, world):
    """Return one result per case, as one rank without padding would: the head put together."""
    ranks = run_ranks(judge_all, world, asked, world) if world > 1 else [judge_all(0, asked, 1)]
    results = []
    for (problem, _, _), *pieces in zip(asked, *ranks, strict=True):
        whole = dict(pieces[0])
        for name in {"weight", "bias"} & set(whole):
            rows = torch.cat([piece[name] for piece in pieces])
            whole[name], padding = rows[: problem.vocab_size], rows[problem.vocab_size :]
            assert not padding.any(), "padding has a gradient"
        for other in pieces[1:]:
            for name in ("loss", "count", "hidden"):
                assert torch.equal(whole[name], other[name]), f"ranks differ in {name}"
        results.append(whole)
    return results


def widths_of(objective, world, i):
    """Return head rows a rank: student's and teacher's equal where columns meet, else different."""
    pair = WIDTHS[world][i % 2]
    mixed = objective.extrapolation != 1 or objective.veto
    meet = objective.support == "full" or objective.baseline == "kl"
    meet = meet or (mixed and objective.normalize == "vocab")
    return (pair[0], pair[0]) if meet and world > 1 else pair


def mistakes(asked, results, wanted, tolerance):
    """Name every case whose loss, count or gradient is not what it must be."""
    found = []
    for i, ((_, objective, options), got, want) in enumerate(
        zip(asked, results, wanted, strict=True)
    ):
        wrong = [] if int(got["count"]) == want["count"] else ["count"]
        fraction = got["means"].get("policy/corrected_fraction")
        if (fraction and tuple(map(int, fraction))) != want["corrected"]:
            wrong.append(f"corrected {fraction}, expected {want['corrected']}")
        for name in ("loss", *({"hidden", "weight", "bias"} & set(want))):
            # a loss is a sum of terms of about 1, which may cancel
            scale = max(1.0 if name == "loss" else 0.01, want[name].abs().max().item())
            error = (got[name].double() - want[name]).abs().max().item() / scale
            if not error < tolerance:
                wrong.append(f"{name} off by {error:.1e}")
        if wrong:
            found.append(f"{i}: {', '.join(wrong)} of {short(objective)} with {options}")
    return found


def short(objective):
    """Return the options that are not the default ones."""
    default, given = asdict(Objective()), asdict(objective)
    return {name: value for name, value in given.items() if value != default[name]}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("support", SUPPORTS)
def test_matrix_of_objectives_is_the_dense_reference(support, world):
    asked, wanted = [], []
    for i, (problem, objective, payload, want) in enumerate(expected(support)):
        chunk = (1, 3, None)[(i + world // 2) % 3]  # every case meets all three
        objective = replace(objective, chunk_tokens=chunk)
        options = dict(widths=widths_of(objective, world, i), payload=payload, measured_M=MEASURED)
        asked.append((problem, objective, options))
        wanted.append(want)
    found = mistakes(asked, on_ranks(asked, world), wanted, 1e-9)
    assert not found, f"{len(found)} of {len(asked)}:\n" + "\n".join(found[:20])


def test_the_matrix_has_every_correction_at_work_in_both_forms():
    """On each problem it acts on some tokens and leaves others alone; but the ratios of the first
    one are all below 1, where tis does nothing."""
    found = {
        (o.correction, o.form, i % 2)
        for support in SUPPORTS
        for i, (_, o, _, want) in enumerate(expected(support))
        if want["corrected"] and 0 < want["corrected"][0] < want["corrected"][1]
    }
    forms = ("direct", "policy_gradient")
    cut = {("tis", form, 1) for form in forms}
    assert found == cut | {
        (x, form, i) for x in ("icepop", "mask") for form in forms for i in (0, 1)
    }


def representatives():
    """Return every fifth structure of every support."""
    return [Objective(**o, k=4, chunk_tokens=4) for x in SUPPORTS for o in structures(x)[::5]]


@pytest.mark.parametrize("world", [1, 2])
def test_fp32_is_the_reference_to_1e_5(world):
    problem = make_problem(seed=2, v=41, h=8, bias=True).to(torch.float32)
    asked = [(problem, o, dict(widths=(48 // world,) * 2)) for o in representatives()]
    got = on_ranks(asked, world)
    assert all(x["loss"].dtype == x["weight"].dtype == torch.float32 for x in got)
    found = mistakes(asked, got, [reference(problem, o) for _, o, _ in asked], 1e-5)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_rounds_products_and_nothing_else(world):
    """One-hot hidden states make logits that are bf16 numbers, so that nothing rounds before the
    loss: it is exact to fp32. Rounding to bf16 costs up to u = 2^-8. ∂/∂z is rounded, and handed
    over as the head's gradient, since every row of it has one token: one u. Multiplied by the
    head it is rounded once more, and the ranks' shares once more when they are added: 2 or 3 u of
    Σ |∂/∂z|·|w|, the sum itself being fp32."""
    problem = make_problem(seed=3, v=41, h=9)
    eye = torch.eye(9, dtype=torch.float64)
    student, teacher = (
        Network(x, problem.student.weight.roll(i, 0)) for i, x in enumerate([eye, eye.flip(0)])
    )
    problem = replace(problem, student=student, teacher=teacher).to(torch.bfloat16)
    asked = [(problem, o, dict(widths=(48 // world,) * 2)) for o in representatives()]
    for (_, objective, _), got in zip(asked, on_ranks(asked, world), strict=True):
        want = reference(problem, objective)
        assert got["hidden"].dtype == got["weight"].dtype == torch.bfloat16
        assert got["loss"].dtype == torch.float32
        assert abs(got["loss"] - want["loss"]) < 2e-6 * max(1, abs(want["loss"])), short(objective)
        logit_gradient = want["weight"].T.abs()  # the head's, since hidden states are one-hot
        bounds = {
            "hidden": (2 + (world > 1)) * logit_gradient @ problem.student.weight.double().abs(),
            "weight": logit_gradient.T,
        }
        for name, bound in bounds.items():
            error = (got[name].double() - want[name]).abs()
            assert (error < 1.01 * bound * 2**-8 + 1e-6).all(), f"{name} of {short(objective)}"


@pytest.mark.parametrize(
    "options", [dict(divergence="cross_entropy"), PG, dict(support="full"), dict(k=41)], ids=str
)
def test_bf16_products_move_the_loss_by_their_rounding(options):
    """Logits of about 1 are rounded by up to 2^-8, and that is what a token's loss moves by; its
    gradient, twice that with the roundings above. Not for small top-k sets: the loss jumps where
    rounded logits tie and another entry is in."""
    problem = make_problem(seed=4, lengths=(30,), v=41, h=8)
    student, teacher = (replace(x, hidden=x.hidden / 4) for x in (problem.student, problem.teacher))
    problem = replace(problem, student=student, teacher=teacher).to(torch.bfloat16)
    objective = Objective(
        **{"support": "sampled" if "k" not in options else "student_topk", **options}
    )
    got, want = judge(problem, objective), reference(problem, objective)
    assert abs(got["loss"] - want["loss"]) < 2**-8 * 29
    assert far(got["hidden"], want["hidden"]) < 2**-7
    assert far(got["weight"], want["weight"]) < 2**-7


# Sets without an entry


@pytest.mark.parametrize("support", ["intersection", "union-intersection"])
def test_an_empty_set_is_worth_nothing_and_is_counted(support):
    """The best of the teacher are the worst of the student; or the same, for what only one has."""
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = logits_problem(z, -z if support == "intersection" else z + z.sign())
    problem = replace(problem, mask=torch.tensor([1.0, 0.0, 1.0]))
    for options in structures(support):
        got = judge(problem, Objective(**options, k=3))
        assert got["loss"] == 0 and not got["hidden"].any() and not got["weight"].any(), options
        total, count = got["means"]["distill/support_empty"]
        assert total == count == 2, options


@pytest.mark.parametrize("options", structures("intersection")[::4], ids=nameless)
def test_one_empty_set_does_not_touch_the_other_tokens(options):
    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = Objective(**options, k=3)
    problem = logits_problem(z, torch.stack([-z[0], z[1].roll(1)]))
    alone = logits_problem(z[1:], z[1:].roll(1))
    both, one = judge(problem, objective), judge(alone, objective)
    assert torch.equal(both["loss"], one["loss"]) and not both["hidden"][0].any()
    assert far(both["hidden"][1:], one["hidden"]) < 1e-12
    assert far(both["hidden"], reference(problem, objective)["hidden"]) < 1e-9


def test_an_empty_set_takes_the_sampled_token_in():
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    empty = Objective(support="intersection", k=3, normalize="vocab", append_sampled=True)
    drawn = judge(logits_problem(z, -z, y=4), empty)
    assert drawn["loss"] != 0 and drawn["means"]["distill/support_empty"][0] == 0


# What is refused

DRAWN = dict(support="sampled")
OUTCOME = dict(DRAWN, **PG, divergence="outcome")
GROUPED = dict(DRAWN, **PG, group_normalize="std")


@pytest.mark.parametrize(
    ("options", "key", "reason"),
    [
        (dict(support="teacher"), "support", "got 'teacher', expected sampled, student_topk, "),
        (dict(support="ful"), "support", "did you mean 'full'"),
        (dict(divergence="rkl"), "divergence", "got 'rkl', expected reverse_kl, "),
        (dict(divergence="cross_entropy"), "support", "expected 'sampled' with .*cross_entropy"),
        (dict(DRAWN, divergence="forward_kl"), "divergence", "got 'forward_kl', expected reverse"),
        (dict(DRAWN, divergence="jsd"), "divergence", "more of the distribution than one token"),
        (DRAWN, "estimator", "got 'k1' with form=direct, .*mean over y ~ p is zero whatever"),
        (dict(DRAWN, estimator="k4"), "estimator", "got 'k4', expected k1, k2, k3"),
        (dict(form="reinforce"), "form", "got 'reinforce', expected direct, policy_gradient"),
        (dict(PG, divergence="forward_kl"), "divergence", "got 'forward_kl', expected reverse_kl"),
        (dict(PG, divergence="jsd"), "divergence", "expected reverse_kl or outcome with form=pol"),
        (dict(PG, **DRAWN, divergence="cross_entropy"), "form", "expected 'direct' with diverg"),
        (
            dict(divergence=lambda s, t: (s - t).sum()),
            "divergence",
            r"gave \[\], expected one value",
        ),
        (dict(divergence=lambda s, t: t), "divergence", "does not"),
        (dict(support=lambda logits_CV: logits_CV), "support", "a parameter 'logits_CV'"),
        (dict(normalize="all"), "normalize", "got 'all', expected support, vocab"),
        (dict(tail=True), "tail", "got true, expected false unless .*normalize=vocab"),
        (dict(support="full", tail=True), "tail", "expected false unless a top-k support"),
        (dict(PG, normalize="vocab", tail=True), "tail", "direct form"),
        (dict(k=0), "k", "got 0, expected 1 or more"),
        (dict(k=1), "k", "got 1, expected 2 or more: .* the gradient is zero"),
        (dict(DRAWN, **PG, append_sampled=True), "append_sampled", "has the sampled token already"),
        (dict(divergence="jsd", jsd_beta=0.0), "jsd_beta", "got 0, expected between 0 and 1"),
        (dict(divergence="jsd", jsd_beta=1.2, jsd_rescale=True), "jsd_beta", "got 1.2, expected"),
        (dict(divergence="skew_kl", skew_alpha=1.0), "skew_alpha", "got 1, expected between"),
        (dict(PG, reward_weight="q"), "reward_weight", "got 'q', expected student_p, teacher_p"),
        (dict(PG, reward_weight_normalize=False), "reward_weight_normalize", "unless normalize=vo"),
        (dict(center_on_support=True), "center_on_support", "only form=policy_gradient"),
        (
            dict(PG, **DRAWN, center_on_support=True),
            "center_on_support",
            "expected a top-k or full",
        ),
        (dict(baseline="kl"), "baseline", "only form=policy_gradient"),
        (dict(PG, baseline="median"), "baseline", "got 'median', expected none, kl, topk_kl, mean"),
        (dict(PG, baseline="mean"), "baseline", "expected it with support=sampled"),
        (dict(PG, baseline="kl", center_on_support=True), "baseline", "takes away again"),
        (dict(reward_floor=-1.0), "reward_floor", "only form=policy_gradient"),
        (dict(PG, reward_floor=1.0, reward_cap=0.0), "reward_floor", "less than .*reward_cap=0"),
        (dict(PG, discount=0.5), "discount", "expected a sampled support"),
        (dict(PG, **DRAWN, discount=1.5), "discount", "got 1.5, expected 0 to 1"),
        (dict(PG, divergence="outcome"), "support", "expected 'sampled' with .*outcome"),
        (dict(DRAWN, divergence="outcome"), "form", "expected 'policy_gradient' .* no gradient"),
        (dict(OUTCOME, baseline="mean"), "baseline", "one reward is the response's advantage"),
        (dict(OUTCOME, discount=1.0), "discount", "one reward is the response's advantage"),
        (dict(OUTCOME, reward_cap=1.0), "reward_cap", "one reward is the response's advantage"),
        (dict(OUTCOME, outcome=0.5), "outcome", "got 0.5, expected 0 with divergence=outcome"),
        (dict(OUTCOME, veto=0.5), "veto", "outcome has no teacher to change"),
        (dict(outcome=1.0), "outcome", "expected 0 unless support=sampled .*set a term with"),
        (dict(outcome=math.nan), "outcome", "got nan, expected a number"),
        (dict(weight=math.inf), "weight", "got inf, expected a number"),
        (dict(group_normalize="std"), "group_normalize", "'none' unless support=sampled"),
        (dict(PG, **DRAWN, group_normalize="var"), "group_normalize", "expected none, mean, std"),
        (
            dict(PG, **DRAWN, group_normalize="std", estimator="k2"),
            "group_normalize",
            "estimator=k1: what is normalised",
        ),
        (dict(GROUPED, baseline="mean"), "baseline", "the rewards that it compares"),
        (dict(GROUPED, extrapolation=1.2), "extrapolation", "the rewards that it compares"),
        (dict(GROUPED, outcome=1.0), "outcome", "the rewards that it compares"),
        (dict(GROUPED, rollout_temperature=None), "group_normalize", "no engine drew"),
        (dict(GROUPED, weights={"rlsd": {}}), "weights", "one wants the response's advantage"),
        (dict(clip_low=0.2), "clip_low", "only a drawn token has a ratio to clip"),
        (dict(OUTCOME, clip_low=1.2), "clip_low", "got 1.2, expected 0 to 1"),
        (dict(OUTCOME, clip_high=-0.1), "clip_high", "got -0.1, expected 0 or more"),
        (dict(OUTCOME, dual_clip=1.0), "dual_clip", "got 1.0, expected more than 1"),
        (dict(OUTCOME, clip_high=0.2, rollout_temperature=None), "clip_high", "no engine drew"),
        (
            dict(OUTCOME, clip_high=0.2, correction="tis"),
            "rollout.correction",
            "both weigh a token by π/μ, and together by its square",
        ),
        (
            dict(OUTCOME, clip_high=0.2, rollout_temperature=0.7),
            "student_temperature",
            "got 1, expected rollout.temperature=0.7",
        ),
        (
            dict(OUTCOME, clip_high=9.0, clip_low=2.0, name="rl"),
            "terms.rl.clip_low",
            "got 2.0, expected 0 to 1",
        ),
        (dict(veto=1.0), "veto", "got 1, expected 0 or more and less than 1"),
        (dict(extrapolation=math.nan), "extrapolation", "got nan"),
        (dict(DRAWN, divergence="cross_entropy", veto=0.1), "veto", "no teacher to change"),
        (dict(student_temperature=0.0), "student_temperature", "got 0.0, expected more than 0"),
        (dict(rollout_temperature=math.nan), "rollout_temperature", "got nan, expected more"),
        (dict(weights={"sodstep": {}}), "weights", "got 'sodstep', .*did you mean 'sod_step'"),
        (
            dict(weights={"prune_drift": dict(cut=1)}),
            "weights.prune_drift",
            "got 'cut', expected threshold, drop, base",
        ),
        (dict(weights={"position_decay": {}}), "weights.position_decay", "missing 'half_life'"),
        (
            dict(weights={against_the_engine: {}}, rollout_temperature=None),
            "weights",
            "rollout_temperature is Non",
        ),
        (
            dict(correction="clip"),
            "rollout.correction",
            "got 'clip', expected none, tis, icepop, mask",
        ),
        (
            dict(correction="tis", rollout_temperature=None),
            "rollout.correction",
            "got 'tis', expected none: no engine drew the responses",
        ),
        (
            dict(correction="mask", correction_low=0.0),
            "rollout.correction_low",
            "got 0, expected more than 0 and at most 1",
        ),
        (dict(correction_low=1.1), "rollout.correction_low", "got 1.1, expected more than 0"),
        (dict(correction_low=math.nan), "rollout.correction_low", "got nan"),
        (dict(correction="tis", correction_high=0.9), "rollout.correction_high", "got 0.9, expec"),
        (dict(correction_high=math.nan), "rollout.correction_high", "got nan, expected 1 or more"),
        (
            dict(correction="icepop", correction_low=1.0, correction_high=1.0),
            "rollout.correction_low, rollout.correction_high",
            "got 1 twice, between which icepop keeps no token",
        ),
        (dict(weights={lambda cap: cap: dict(cap=1)}), "weights", "no parameter of position_N"),
        (dict(aggregation="mean"), "aggregation", "got 'mean', expected token-mean, "),
        (
            dict(aggregation="seq-mean-token-sum-norm"),
            "fixed_length",
            "got None, expected a length",
        ),
        (dict(fixed_length=9), "fixed_length", "got 9, expected a length exactly when"),
        (dict(position_bucket=64), "max_tokens", "missing, but position_bucket"),
        (dict(chunk_tokens=0), "chunk_tokens", "got 0, expected 1 or more"),
    ],
    ids=lambda x: nameless(x) if isinstance(x, dict) else "",
)
def test_impossible_objectives_are_refused(options, key, reason):
    with pytest.raises(ValueError, match=reason) as error:
        Objective(**options)
    assert key in str(error.value).split(":")[0] and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "payload", "reason"),
    [
        (dict(k=14), "hidden", r"objective\.k: got 14, expected at most the vocabulary's 13"),
        (dict(support="student_topk"), "topk", "teacher: got TopKScores, .*support=student_topk"),
        (dict(support="teacher_topk"), "sampled", "teacher: got SampledScores, .*teacher_topk"),
        (dict(support="teacher_topk", append_sampled=True), "topk", "append_sampled wants"),
        (dict(support="teacher_topk", normalize="vocab", veto=0.1), "topk", "target is mixed"),
        (dict(PG, **DRAWN, baseline="kl"), "sampled", "baseline=kl wants its distribution"),
        (
            dict(PG, **DRAWN, weights={"teacher_entropy_gate": {}}),
            "sampled",
            r"objective\.weights\.teacher_entropy_gate wants its teacher_entropy_N",
        ),
    ],
    ids=nameless,
)
def test_a_teacher_that_cannot_serve_is_refused(options, payload, reason):
    with pytest.raises(ValueError, match=reason):
        judge(make_problem(), Objective(**{"k": 4, **options}), payload=payload)


def test_impossible_calls_are_refused():
    problem = make_problem()
    hidden, head, batch = problem.student.hidden, head_of(problem.student), batch_of(problem)
    teacher = HiddenScores(problem.teacher.hidden, head_of(problem.teacher))
    supervised = Objective(support="sampled", divergence="cross_entropy")
    with pytest.raises(ValueError, match=r"teacher: got none, .*divergence=reverse_kl needs one"):
        Objective()(hidden, head, batch)
    with pytest.raises(ValueError, match=r"teacher: got one, .*divergence=cross_entropy uses none"):
        supervised(hidden, head, batch, teacher)
    with pytest.raises(ValueError, match=r"base: got none, .*extrapolation=1.25 needs one"):
        Objective(extrapolation=1.25, k=4)(hidden, head, batch, teacher)
    with pytest.raises(ValueError, match=r"base: got one, but objective.extrapolation=1.0 uses no"):
        Objective(k=4)(hidden, head, batch, teacher, teacher)
    with pytest.raises(ValueError, match="rollout_topk needs the engine's top ids"):
        judge(problem, Objective(support="rollout_topk", k=4), rollout_ids_NK=None)
    colder = scores_of(problem, Objective(teacher_temperature=0.5, k=4), "topk", teacher.head)
    with pytest.raises(ValueError, match=r"teacher: scored at temperature 0.5, .*temperature=1"):
        Objective(support="teacher_topk", k=4)(hidden, head, batch, colder)
    wider = make_problem(v=14).teacher
    other = HiddenScores(wider.hidden, head_of(wider))
    with pytest.raises(ValueError, match=r"teacher: got a head of 14 entries, expected .* 13"):
        Objective(k=4)(hidden, head, batch, other)


@pytest.mark.parametrize(
    "options",
    [
        dict(support="full"),
        dict(PG, **DRAWN, baseline="kl"),
        dict(normalize="vocab", veto=0.1),
        dict(normalize="vocab", extrapolation=1.25),
    ],
    ids=nameless,
)
def test_columns_that_are_compared_must_be_on_the_same_rank(options):
    """Every rank says so, and none waits for another."""
    for message in run_ranks(refusal, 2, make_problem(), Objective(**options, k=4)):
        assert message.startswith("teacher: got 8 head rows on this rank, expected the student's 7")


def refusal(rank, problem, objective):
    with pytest.raises(ValueError) as error:
        judge(problem, objective, rank=rank, widths=(7, 8), group=dist.group.WORLD)
    return str(error.value)
