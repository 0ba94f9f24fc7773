"""The watch: silent on healthy curves, one line for each that is bad, and the same on resuming."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.watch import Watch

VOCAB = 150_000


def healthy(step: int, draw: random.Random) -> dict[str, float]:
    """Return a record as the paper's good runs have them, with their noise."""
    done = 1 - math.exp(-step / 80)

    def noise(size: float) -> float:
        return draw.gauss(0, size)

    record = {
        "distill/overlap_ratio": 0.72 + 0.19 * done + noise(0.01),
        "distill/overlap_mass_student": 0.98 + noise(0.003),
        "distill/overlap_mass_teacher": 0.98 + noise(0.003),
        "teacher/entropy": 0.4 + noise(0.02),
        "optim/grad_norm": (0.5 - 0.2 * done) * math.exp(noise(0.4)),
        "rollout/truncated_fraction": min(1, max(0, 0.3 - 0.2 * done + noise(0.04))),
        "policy/mismatch_kl": 3e-4 * math.exp(noise(0.5)),
    }
    for bucket in range(7):
        level = 0.3 + 0.05 * bucket - 0.1 * done
        record[f"student/entropy@{1024 * bucket}"] = level * math.exp(noise(0.15))
    return record


def lines_of(change=lambda step, record: record, *, steps=200, vocab_size=VOCAB, seed=0):
    """Return what a watch says of healthy records that `change` has spoilt: (step, line)."""
    watch, draw = Watch(vocab_size=vocab_size, k=16), random.Random(seed)
    said = []
    for step in range(1, steps + 1):
        record = change(step, healthy(step, draw))
        said += [(step, line) for line in watch.see(step, record)]
    return said


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_healthy_curves_are_silent(seed):
    assert lines_of(seed=seed, steps=250) == []


def test_stale_responses_are_no_mismatch_of_the_engine():
    def stale(step, record):
        late = step % 4 != 1
        mismatch = {"policy/mismatch_kl": 0.2} if late else {}
        return record | mismatch | {"rollout/staleness_steps": float(late)}

    assert lines_of(stale) == []


def test_a_run_without_a_teacher_or_measurements_is_silent():
    only = ("optim/grad_norm", "rollout/truncated_fraction")
    assert lines_of(lambda step, record: {name: record[name] for name in only}) == []
    sparse = lines_of(lambda step, record: record if step % 10 == 0 else {})
    assert sparse == []


def set_to(name, value, since=100):
    return lambda step, record: record | ({name: value(step)} if step >= since else {})


def grow_late(step, record):
    grown = 1 + max(0, step - 100) / 20
    late = {f"student/entropy@{1024 * bucket}" for bucket in (4, 5, 6)}
    return {name: value * (grown if name in late else 1) for name, value in record.items()}


BAD = {
    "teacher entropy": (set_to("teacher/entropy", lambda _: 11.5), "teacher: its entropy is 11.50"),
    "one teacher of several": (
        set_to("teacher/entropy@code", lambda _: 11.5),
        "teachers.code: its entropy is 11.50",
    ),
    "falling overlap": (
        set_to("distill/overlap_ratio", lambda step: 0.8 - 0.002 * (step - 100)),
        "distill/overlap_ratio fell",
    ),
    "stagnant overlap": (
        set_to("distill/overlap_ratio", lambda step: 0.5, since=1),
        "distill/overlap_ratio stands at 0.50",
    ),
    "suffix wave": (grow_late, "beyond token 5120"),
    "spike": (
        lambda step, record: record | ({"optim/grad_norm": 30.0} if step == 120 else {}),
        "optim/grad_norm: 30 is",
    ),
    "truncation": (
        set_to("rollout/truncated_fraction", lambda _: 0.9),
        "rollout/truncated_fraction rose",
    ),
    "growing mismatch": (
        set_to("policy/mismatch_kl", lambda step: 3e-4 * 1.1 ** (step - 100)),
        "policy/mismatch_kl is",
    ),
    "stale engine": (set_to("policy/mismatch_kl", lambda _: 2.9, since=2), "policy/mismatch_kl is"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_curve_is_told_once(name):
    change, told = BAD[name]
    ((step, line),) = lines_of(change)
    assert line.startswith(told) or told in line, line
    assert "\n" not in line and step <= 200


def test_entropies_that_grow_everywhere_are_no_wave_from_the_end():
    def grow(step, record):
        factor = 1 + max(0, step - 100) / 20
        return {n: v * (factor if "entropy@" in n else 1) for n, v in record.items()}

    assert lines_of(grow) == []


def test_with_a_small_vocabulary_the_masses_are_watched_and_the_ratio_is_not():
    """In the quickstart, 16 of 55 tokens overlap less at first, with all mass on the overlap."""
    falls = set_to("distill/overlap_ratio", lambda step: 0.8 - 0.002 * (step - 100))
    assert lines_of(falls, vocab_size=55) == []
    mass = set_to("distill/overlap_mass_student", lambda step: 0.98 - 0.002 * (step - 100))
    ((_, line),) = lines_of(mass, vocab_size=55)
    assert line.startswith("distill/overlap_mass_student fell")


def test_a_resumed_run_stands_where_it_stood(tmp_path):
    change, _ = BAD["truncation"]
    draw = random.Random(1)
    records = [change(step, healthy(step, draw)) for step in range(1, 141)]

    def watched(stop: int) -> list[str]:
        watch = Watch(vocab_size=VOCAB, k=16)
        file = tmp_path / "metrics.jsonl"
        file.write_text(
            "".join(json.dumps({"step": i + 1, **r}) + "\n" for i, r in enumerate(records[:stop]))
        )
        watch.recall(file)
        return [x for i, r in enumerate(records[stop:], stop) for x in watch.see(i + 1, r)]

    whole = watched(0)
    assert len(whole) == 1
    assert watched(60) == whole and watched(101) == whole  # told after the resumption
    assert watched(130) == []  # told before it
