"""Will the student learn anything? Figures → rows: pure functions that know no model.

Thresholds that are not here are in `signs`. The advice of a row that is not ok stands alone: the
verdict repeats the first one that matters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd import signs
from megatron_opd.doctor.report import Row, Verdict, not_run
from megatron_opd.probes.statistics import Estimate

GAP_NATS = 0.5  # judgement: models that agree have entropies of 0.1 to 1 nat on their responses
KL_NATS = 1.0  # judgement: working pairs start at 0.1 to 0.5 nats a token
SAME_KL = 0.02  # judgement: nats a token between a model and itself a few steps later
# Judgement: what another template must bring, of the KL and of the overlap, beyond its interval.
# The paper's aligned template is worth 5 points of gap recovery.
TEMPLATE_KL, TEMPLATE_OVERLAP = 0.2, 0.03
AUROC = 0.6  # paper: 0.73 and 0.75; ½ is chance
EACH = 3  # judgement: right and wrong responses without which an AUROC is an accident
CUT, CUT_FAILING = 0.2, 0.8  # judgement: share of responses that are truncated
FORMAT, FORMAT_FAILING = 0.5, 0.05  # judgement: share of responses that the grader can read
DEAD = 0.1  # judgement: share of the strongest bucket's KL below which a bucket has no signal
FEWEST = 8  # judgement: responses that must reach a bucket before it is judged


def overlap(ratio: Estimate, *, k: int, vocab_size: int, remedy: str) -> Row:
    """Judge the overlap of the top-k sets (Eq. 6), where they are small beside the vocabulary."""
    value = f"{_shown(ratio)} of the top {k}"
    if not signs.ratio_counts(k, vocab_size):
        return Row("overlap ratio", "ok", f"{value}; of {vocab_size} tokens, so the mass counts")
    if ratio.value >= signs.OVERLAP_LOW:
        return Row("overlap ratio", "ok", value)
    verdict: Verdict = "warn" if ratio.value >= signs.OVERLAP_FAILING else "fail"
    advice = f"low overlap ({ratio.value:.2f}): cold start first, {remedy}"
    return Row("overlap ratio", verdict, value, advice)


def mass(student: Estimate, teacher: Estimate, *, remedy: str) -> Row:
    """Judge the probability that both models have on the overlap (Eqs. 9, 10)."""
    value = f"student {_shown(student)}, teacher {_shown(teacher)}"
    least = min(student.value, teacher.value)
    if least >= signs.MASS_LOW:
        return Row("overlap mass", "ok", value)
    verdict: Verdict = "warn" if least >= signs.MASS_FAILING else "fail"
    advice = f"low overlap (mass {least:.2f}): cold start first, {remedy}"
    return Row("overlap mass", verdict, value, advice)


def entropy_gap(gap: Estimate, student: float, teacher: float) -> Row:
    """Judge the mean |H(q) − H(p)| (Eq. 8)."""
    value = f"{_shown(gap)} nats; student {student:.2f}, teacher {teacher:.2f}"
    if gap.value < GAP_NATS:
        return Row("entropy gap", "ok", value)
    surer = "student" if student < teacher else "teacher"
    advice = f"the {surer} is much surer than the other; see whether both models know the prompts"
    return Row("entropy gap", "warn", value, advice)


def reverse_kl(kl: Estimate) -> Row:
    """Judge KL(p‖q) on the student's responses, nats a token."""
    value = f"{_shown(kl)} nats a token"
    if kl.value < KL_NATS:
        return Row("reverse KL", "ok", value)
    advice = "the teacher finds what the student writes very unlikely; see template and overlap"
    return Row("reverse KL", "warn", value, advice)


@dataclass(frozen=True)
class Variant:
    """Another way to render the prompts, beside the configured one on the same prompts."""

    keys: str  # what to set
    kl: float
    overlap: float  # ratio, or mass where the ratio says nothing
    kl_less: Estimate  # configured − this, mean over prompts
    overlap_more: Estimate  # this − configured

    def better_than(self, kl: float) -> bool:
        """Whether one of both is clearly better, and the other no worse."""
        worth = max(TEMPLATE_KL * kl, SAME_KL)
        nearer = self.kl_less.low > 0 and self.kl_less.value > worth
        closer = self.overlap_more.low > 0 and self.overlap_more.value > TEMPLATE_OVERLAP
        return (nearer and self.overlap_more.value > -TEMPLATE_OVERLAP) or (
            closer and self.kl_less.value > -worth
        )


def template(
    kl: float,
    overlap: float,
    variants: Sequence[Variant],
    left_out: Sequence[str] = (),
    *,
    failing: float,
) -> Row:
    """Judge the configured template against others by what the teacher thinks of the responses.

    A failure where the configured overlap is `failing` and the other's is not.
    """
    shown = [f"as configured KL {kl:.2f}, overlap {overlap:.2f}"]
    shown += [f"{v.keys} {v.kl:.2f}, {v.overlap:.2f}" for v in variants]
    value = "; ".join([*shown, *left_out])
    if not variants:
        return not_run("template", f"no other template to compare with; {value}")
    better = [v for v in variants if v.better_than(kl)]
    if not better:
        return Row("template", "ok", value)
    best = min(better, key=lambda v: v.kl)
    rescued = overlap < failing <= best.overlap
    advice = (
        f"another template suits the teacher better: set {best.keys} (KL {kl:.2f} → {best.kl:.2f}, "
        f"overlap {overlap:.2f} → {best.overlap:.2f})"
    )
    return Row("template", "fail" if rescued else "warn", value, advice)


def reward_auroc(found: Estimate | None, *, right: int, responses: int) -> Row:
    """Judge whether the teacher's mean reward of a response tells right from wrong."""
    if found is None or min(right, responses - right) < EACH:
        reason = f"{right} of {responses} responses are right: too few of one kind to compare"
        return not_run("reward AUROC", reason)
    value = f"{_shown(found)} over {right} right of {responses}"
    if found.high < 0.5:
        advice = "the teacher prefers wrong responses: its reward leads away from the verifier's"
        return Row("reward AUROC", "warn", value, advice)
    if found.value < AUROC and found.low < 0.5:
        advice = "no better than chance so far: the teacher's reward may not follow correctness"
        return Row("reward AUROC", "warn", value, f"{advice}; look at more --prompts")
    return Row("reward AUROC", "ok", value)


def margin(student: Estimate, teacher: Estimate, difference: Estimate) -> Row:
    """Judge how much better the teacher is than the student, by the verifier."""
    value = f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]: teacher "
    value += f"{teacher.value:.2f}, student {student.value:.2f}"
    if difference.low > 0:
        return Row("teacher's margin", "ok", value)
    if difference.high < 0:
        advice = "the teacher is worse than the student by the verifier: the student will regress"
        return Row("teacher's margin", "fail", value, advice)
    advice = "within noise: the teacher may have nothing to teach; look at more --prompts"
    return Row("teacher's margin", "warn", value, advice)


def truncation(student: float, teacher: float, *, max_tokens: int) -> Row:
    """Judge the share of responses that were cut at `max_tokens`."""
    value = f"student {student:.0%}, teacher {teacher:.0%} at {max_tokens} tokens"
    if student < CUT:
        return Row("truncation", "ok", value)
    advice = (
        "many responses do not end: raise rollout.max_tokens, check rollout.stop_token_ids, or set "
        "rollout.mask_truncated=true"
    )
    return Row("truncation", "warn" if student < CUT_FAILING else "fail", value, advice)


def form(what: str, student: float, teacher: float, *, remedy: str) -> Row:
    """Judge the share of responses in which `what` is found."""
    value = f"{what}: student {student:.0%}, teacher {teacher:.0%}"
    if student >= FORMAT:
        return Row("format", "ok", value)
    verdict: Verdict = "warn" if student >= FORMAT_FAILING else "fail"
    return Row("format", verdict, value, remedy)


def news(kl: float, difference: Estimate | None, *, equal_weights: bool) -> Row:
    """Judge whether the teacher is another model than the student at all.

    A *bigger* model of the same data, from which the paper's students learn nothing either, does
    not show here: its distribution is another one, and its answers are better.
    """
    value = "equal weights" if equal_weights else f"reverse KL {kl:.3f} nats a token"
    if difference is not None:
        value += f", margin {difference.value:+.2f}"
    better = difference is not None and difference.low > 0
    if equal_weights or (kl < SAME_KL and not better):
        advice = "teacher adds nothing new: same pipeline? Take one that was trained further, on "
        return Row("new knowledge", "warn", value, advice + "data or rewards the student never saw")
    return Row("new knowledge", "ok", value)


@dataclass(frozen=True)
class Bucket:
    """Response tokens at positions from `start` on."""

    start: int
    kl: Estimate  # reverse KL, nats a token
    responses: int  # that reach it


def reach(buckets: Sequence[Bucket]) -> Row:
    """Judge from which position on the teacher has nothing to correct.

    The paper lets the teacher continue cut responses instead: `tools/probe.py continuation`.
    """
    judged = [bucket for bucket in buckets if bucket.responses >= FEWEST]
    if len(judged) < 2:
        starts = ", ".join(str(bucket.start) for bucket in buckets)
        value = f"too few responses reach a second bucket of positions (from {starts})"
        return Row("signal by position", "ok", value)
    value = "KL " + ", ".join(f"{bucket.kl.value:.2f} from {bucket.start}" for bucket in judged)
    strongest, dead = max(bucket.kl.value for bucket in judged), None
    for bucket in reversed(judged):
        if bucket.kl.high >= DEAD * strongest:
            break
        dead = bucket.start
    if not dead:
        return Row("signal by position", "ok", value)
    advice = f"prefixes beyond {dead} tokens carry no signal: cap the response, "
    return Row("signal by position", "warn", value, f"{advice}rollout.max_tokens={dead}")


def _shown(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
