"""The rules on figures alone: good passes, bad is named, and worse is never better."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.doctor import prospects, soundness
from megatron_opd.doctor.checks import GRADED
from megatron_opd.doctor.prospects import Bucket, Variant
from megatron_opd.doctor.report import Row, not_run, table
from megatron_opd.doctor.soundness import Sanity
from megatron_opd.doctor.verdict import BROKEN, DECISIVE, verdict
from megatron_opd.probes.statistics import Estimate
from megatron_opd.reward import REWARDS

V = 151_669
GOOD = {"prompts": 1.4, "responses": 0.6}
ORDER = {"ok": 0, "warn": 1, "fail": 2}
PART = st.floats(0, 1)


def near(value: float, width: float = 0.02) -> Estimate:
    return Estimate(value, value - width, value + width)


def sane(**changes) -> Sanity:
    known = dict(finite=True, vocab_size=V, entropy=0.4, nll=GOOD, choices=300, tokens=2000)
    return Sanity(**{**known, **changes})


def test_tokenizers_are_compared_by_their_differences():
    assert soundness.tokenizers([], ids=V, allowed=False).verdict == "ok"
    differ = [f"{i}: 'a' vs 'b'" for i in range(7)]
    row = soundness.tokenizers(differ, ids=V, allowed=False)
    assert row.verdict == "fail" and "7 of 151,669" in row.value and "0: 'a' vs 'b'" in row.value
    assert soundness.tokenizers(differ, ids=V, allowed=True).verdict == "warn"


def test_stop_ids_are_named_where_only_one_model_ends_with_them():
    both = {151643: "<|endoftext|>", 151645: "<|im_end|>"}
    base = {151643: "<|endoftext|>"}
    assert soundness.stop_ids(both, both).verdict == "ok"
    row = soundness.stop_ids(base, both)
    assert row.verdict == "warn" and "add [151645] to rollout.stop_token_ids" in row.advice
    row = soundness.stop_ids(both, base)
    assert row.verdict == "warn" and "151645 '<|im_end|>'" in row.advice


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"finite": False}, "not finite"),
        ({"entropy": math.log(V) - 1e-3}, "prefers hardly any token"),
        ({"choices": 1}, "the same whatever came before"),
        ({"nll": {"prompts": 12.0, "responses": 14.0}}, "as if it knew nothing"),
    ],
)
def test_a_degenerate_model_fails(changes, told):
    row = soundness.loads("teacher", sane(**changes))
    assert row.verdict == "fail" and told in row.advice and "teacher.path" in row.advice


def test_a_model_of_responses_alone_need_not_know_prompts():
    assert soundness.loads("student", sane()).verdict == "ok"
    known = sane(vocab_size=55, nll={"prompts": 9.0, "responses": 0.1}, entropy=0.2)
    assert soundness.loads("student", known).verdict == "ok"


def test_logits_are_judged_by_their_type():
    def verdict(largest, dtype):
        return soundness.same_logits("student", largest, dtype=dtype, tokens=99).verdict

    assert verdict(4e-6, "float32") == verdict(0.1, "bfloat16") == "ok"
    assert verdict(0.1, "float32") == verdict(3.0, "bfloat16") == "fail"
    assert verdict(math.nan, "float32") == "fail"


def test_engine_and_control():
    assert soundness.engine("vllm", 3e-4, 0.3).verdict == "ok"
    assert soundness.engine("vllm", 0.03, 2.0).verdict == "warn"
    assert soundness.engine("vllm", 2.9, 9.0).verdict == "fail"
    assert soundness.engine("vllm", math.nan, math.nan).verdict == "fail"
    assert soundness.control(1e-8).verdict == "ok"
    assert (
        soundness.control(-0.3).verdict == "fail" and soundness.control(math.nan).verdict == "fail"
    )


def overlap(value: float, vocab_size: int = V) -> Row:
    return prospects.overlap(near(value), k=16, vocab_size=vocab_size, remedy="COMMAND")


def test_low_overlap_asks_for_a_cold_start():
    assert overlap(0.72).verdict == "ok"  # where the paper's good runs start
    row = overlap(0.41)
    assert row.verdict == "fail"
    assert row.advice == "low overlap (0.41): cold start first, COMMAND"
    assert overlap(0.55).verdict == "warn"
    assert overlap(0.41, vocab_size=55).verdict == "ok"  # 16 of 55 tokens: the mass counts
    assert prospects.mass(near(0.98), near(0.97), remedy="COMMAND").verdict == "ok"
    assert prospects.mass(near(0.98), near(0.6), remedy="COMMAND").verdict == "fail"


@given(PART, PART)
def test_less_overlap_is_never_better(one, other):
    low, high = sorted((one, other))
    assert ORDER[overlap(low).verdict] >= ORDER[overlap(high).verdict]
    masses = [prospects.mass(near(x), near(0.99), remedy="") for x in (low, high)]
    assert ORDER[masses[0].verdict] >= ORDER[masses[1].verdict]


def way(kl: float, overlap: float, *, than: tuple[float, float], noise: float = 0.01) -> Variant:
    less, more = than[0] - kl, overlap - than[1]
    return Variant("data.template=boxed", kl, overlap, near(less, noise), near(more, noise))


def template(kl: float, overlap: float, *others: Variant) -> Row:
    return prospects.template(kl, overlap, others, ["data.template=dapo: too long"], failing=0.45)


def test_a_template_that_suits_better_is_named():
    row = template(0.4, 0.70, way(0.2, 0.78, than=(0.4, 0.70)))
    assert row.verdict == "warn" and "set data.template=boxed" in row.advice
    assert "too long" in row.value
    row = template(2.4, 0.30, way(0.2, 0.78, than=(2.4, 0.30)))
    assert row.verdict == "fail" and "set data.template=boxed" in row.advice


@pytest.mark.parametrize(
    "other",
    [
        way(0.5, 0.60, than=(0.4, 0.70)),  # worse
        way(0.38, 0.71, than=(0.4, 0.70)),  # hardly better
        way(0.2, 0.78, than=(0.4, 0.70), noise=0.5),  # perhaps
        way(0.2, 0.60, than=(0.4, 0.70)),  # nearer, and less shared
        way(0.6, 0.78, than=(0.4, 0.70)),  # more shared, and farther
    ],
)
def test_a_template_that_is_not_clearly_better_is_not(other):
    assert template(0.4, 0.70, other).verdict == "ok"


def test_a_template_does_not_matter_to_two_models_that_are_one():
    assert template(0.002, 0.99, way(0.0005, 0.99, than=(0.002, 0.99), noise=1e-4)).verdict == "ok"


def test_without_another_template_there_is_no_approval():
    row = template(0.4, 0.7)
    assert row.verdict == "warn" and row.value == "not run" and "too long" in row.advice


def test_reward_auroc():
    def judged(estimate, right=20):
        return prospects.reward_auroc(estimate, right=right, responses=32)

    assert judged(Estimate(0.74, 0.6, 0.86)).verdict == "ok"  # the paper's
    assert judged(Estimate(0.55, 0.3, 0.75)).verdict == "warn"
    wrong = judged(Estimate(0.2, 0.1, 0.4))
    assert wrong.verdict == "warn" and "prefers wrong" in wrong.advice
    assert judged(Estimate(1.0, 1.0, 1.0), right=1).value == "not run"
    assert judged(None, right=32).value == "not run"


def margin(value: float, width: float = 0.1) -> Row:
    return prospects.margin(near(0.3), near(0.3 + value), near(value, width))


def test_a_worse_teacher_fails_and_noise_is_a_doubt():
    assert margin(0.3).verdict == "ok"
    assert margin(0.05).verdict == "warn" and "within noise" in margin(0.05).advice
    assert margin(-0.3).verdict == "fail"


def test_the_same_pipeline_adds_nothing_new():
    assert prospects.news(0.3, near(0.3, 0.1), equal_weights=False).verdict == "ok"
    assert prospects.news(0.004, near(0.3, 0.1), equal_weights=False).verdict == "ok"
    told = "teacher adds nothing new: same pipeline?"
    for row in (
        prospects.news(0.004, near(0.02, 0.1), equal_weights=False),
        prospects.news(0.004, None, equal_weights=False),
        prospects.news(0.0, near(0.0, 0.0), equal_weights=True),
    ):
        assert row.verdict == "warn" and row.advice.startswith(told)


def bucket(start: int, kl: float, responses: int = 20) -> Bucket:
    return Bucket(start, near(kl, 0.01), responses)


def test_positions_without_signal_are_cut_only_when_measured():
    live = [bucket(0, 0.3), bucket(1024, 0.25), bucket(2048, 0.2)]
    assert prospects.reach(live).verdict == "ok"
    row = prospects.reach([*live, bucket(3072, 0.005), bucket(4096, 0.004)])
    assert row.verdict == "warn" and "rollout.max_tokens=3072" in row.advice
    assert row.advice.startswith("prefixes beyond 3072 tokens carry no signal: cap the response")
    # a gap that signal follows, and buckets that few responses reach, are nothing to cut
    assert prospects.reach([bucket(0, 0.3), bucket(1024, 0.005), bucket(2048, 0.2)]).verdict == "ok"
    assert prospects.reach([*live, bucket(3072, 0.005, responses=3)]).verdict == "ok"
    assert prospects.reach([bucket(0, 0.3)]).verdict == "ok"


def test_truncation_form_gap_and_memory():
    def cut(share):
        return prospects.truncation(share, 0.0, max_tokens=7168).verdict

    assert (cut(0.05), cut(0.4), cut(1.0)) == ("ok", "warn", "fail")
    shares = [prospects.form("box", x, 1.0, remedy="set it").verdict for x in (0.9, 0.3, 0.0)]
    assert shares == ["ok", "warn", "fail"]
    assert prospects.entropy_gap(near(0.2), 0.5, 0.4).verdict == "ok"
    assert "student is much surer" in prospects.entropy_gap(near(0.9), 0.1, 1.0).advice
    assert prospects.reverse_kl(near(0.3)).verdict == "ok"
    assert prospects.reverse_kl(near(8.0)).verdict == "warn"
    gib = 2**30
    sizes = [soundness.memory(x * gib, 80 * gib, device="the GPU").verdict for x in (60, 78, 90)]
    assert sizes == ["ok", "warn", "fail"]


OK = [Row(name, "ok", "") for name in (*BROKEN, *DECISIVE)]


def with_rows(*changed: Row) -> Row:
    """Return the verdict of rows that are all ok but for some."""
    new = {row.check: row for row in changed}
    known = [new.pop(row.check, row) for row in OK]
    return verdict([*known, *new.values()])


def test_the_verdict_is_go_where_nothing_is_wrong():
    assert with_rows() == Row("verdict", "ok", "compatible, go")
    skipped = with_rows(not_run("reward AUROC", "no answers"), margin(0.05))
    assert skipped.value == "compatible, go"
    assert skipped.advice == "look at: teacher's margin, reward AUROC"


def test_the_verdict_names_the_cause_before_its_consequence():
    aligned = template(2.4, 0.30, way(0.2, 0.78, than=(2.4, 0.30)))
    row = with_rows(overlap(0.30), aligned, margin(-0.5))
    assert row.verdict == "fail" and row.value == aligned.advice
    assert with_rows(overlap(0.41)).value == "low overlap (0.41): cold start first, COMMAND"
    same = prospects.news(0.0, None, equal_weights=True)
    assert with_rows(same).verdict == "warn" and "same pipeline?" in with_rows(same).value
    dead = soundness.loads("teacher", sane(finite=False))
    broken = with_rows(dead, overlap(0.1), same)
    assert broken.verdict == "fail" and broken.value.startswith("teacher loads: ")


def test_what_was_not_run_decides_nothing():
    rest = [not_run(name, "tokenizers failed") for name in DECISIVE]
    row = verdict([soundness.tokenizers(["0: 'a' vs 'b'"], ids=9, allowed=False), *rest])
    assert row.verdict == "fail" and row.value.startswith("tokenizers: ")
    assert with_rows(not_run("overlap ratio", "no teacher")).value == "compatible, go"


def test_the_table_is_aligned_and_colored_only_when_asked():
    rows = [overlap(0.41), margin(0.3), not_run("template", "there is no other")]
    text = table(rows, width=80)
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines) and "\033" not in text
    first = [line for line in lines if line[0] != " "]
    assert [line[18:24] for line in first] == ["fail  ", "ok    ", "warn  "]
    assert all(line[:24].isspace() for line in lines if line not in first)
    assert "not run: there is no other" in lines[-1]
    assert "\033[31mfail\033[0m" in table(rows, color=True)


def test_the_graders_that_want_a_form_are_rewards_that_exist():
    assert set(GRADED) <= set(REWARDS)
