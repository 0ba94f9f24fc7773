"""What a config asks of engine, teacher and base."""

from contextlib import closing

import pytest

from megatron_opd import parallel as mesh
from megatron_opd.build import (
    build_engines,
    build_objective,
    build_student,
    connect,
    judges,
    samplings,
)
from megatron_opd.config_file import load_config
from megatron_opd.inputs import load_tokenizer
from megatron_opd.rollout.mixed import MixedEngine
from tests.distributed import run_ranks
from tests.home import make_home


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the config of a home with overrides."""
    monkeypatch.chdir(make_home(tmp_path))
    return lambda *overrides: load_config(["config.yaml"], overrides)


def gap(s, t):
    """A divergence."""
    return (s - t).square()


def the_engines(rollout_ids_CK):
    """A support."""
    return rollout_ids_CK, rollout_ids_CK >= 0


def early(position_N, limit=3):
    """A weight."""
    return (position_N < limit).float()


def test_names_with_a_colon_are_functions_and_the_others_are_the_losss_own(load):
    words = ["objective.support=tests.test_build:the_engines", "objective.k=8"]
    words += ["objective.divergence=tests.test_build:gap", "rollout.temperature=0.7"]
    words += ["objective.weights={tests.test_build:early: {limit: 5}, sod_step: {step_tokens: 3}}"]
    words += ["rollout={correction: icepop, correction_low: 0.4, correction_high: 3.0}"]
    objective = build_objective(load(*words, "metrics.position_bucket=9"))
    assert (objective.support, objective.divergence) == (the_engines, gap)
    assert objective.weights == {early: {"limit": 5}, "sod_step": {"step_tokens": 3}}
    corrected = objective.correction, objective.correction_low, objective.correction_high
    assert corrected == ("icepop", 0.4, 3.0)
    assert (objective.rollout_temperature, objective.k) == (0.7, 8)
    assert (objective.position_bucket, objective.max_tokens) == (9, 36)
    replay = load("rollout={engine: replay, n: 1}")
    assert build_objective(replay).rollout_temperature is None


def test_a_server_is_asked_as_its_section_says(load):
    rollout = "{engine: vllm_server, url: http://x/, timeout_s: 7, retries: 1, batch_size: 9}"
    teacher = "{kind: server, url: http://y, payload: topk, timeout_s: 8, retries: 2}"
    config = load(f"rollout={rollout}", f"teacher={teacher}", "objective.support=teacher_topk")
    found = []
    for section in (config.rollout, config.teacher):
        with closing(connect(section, config)) as server:
            in_flight = server._places._value
            found.append((server.url, server.timeout, server.retries, in_flight))
    assert found == [("http://x", 7, 1, 9), ("http://y", 8, 2, 9)]


def _mixes(rank, configs):
    """Say of each config's engines: the share of the dataset and its coin, and who evaluates."""
    student = build_student(configs[0], mesh.initialize(), vocab_size=260, steps=1)
    found = []
    for config in configs:
        engine, held_out = build_engines(config, student, load_tokenizer("student"))
        assert not isinstance(held_out, MixedEngine)
        mixed = isinstance(engine, MixedEngine)
        assert (engine.engine if mixed else engine) is held_out
        found.append((engine.fraction, engine.by) if mixed else None)
    return found


def test_the_engines_mix_as_the_config_says(load):
    changing = "schedules.rollout.data_fraction={start: 0.0, end: 1.0, steps: 5}"
    every = [
        load("student.init=random"),
        load("rollout.data_fraction=0.3"),
        load("rollout.data_fraction=0.7", "rollout.data_choice=step"),
        load(changing, "rollout.data_choice=step"),
    ]
    mixed = [None, (0.3, "prompt"), (0.7, "step"), (0.0, "step")]
    assert run_ranks(_mixes, 1, every) == [mixed]


@pytest.mark.parametrize(
    ("support", "ids"),
    [("student_topk", 0), ("rollout_topk", 5), ("tests.test_build:the_engines", 5), ("full", 0)],
)
def test_the_engine_is_asked_for_ids_where_the_support_wants_them(load, support, ids):
    config = load(f"objective.support={support}", "objective.k=5")
    training, evaluation = samplings(config, build_objective(config), (2,))
    assert (training.top_ids, evaluation.top_ids) == (ids, 0)


@pytest.mark.parametrize(
    ("objective", "payload"),
    [
        ("{extrapolation: 1.25}", "hidden"),
        ("{extrapolation: 1.25, support: sampled, form: policy_gradient}", "sampled"),
        ("{extrapolation: 1.25, support: sampled, form: policy_gradient, baseline: kl}", "hidden"),
    ],
)
def test_the_base_answers_as_briefly_as_the_objective_allows(load, objective, payload):
    config = load(f"objective={objective}", "base.path=teacher")
    found = judges(config, build_objective(config))
    assert found == {"teacher": (config.teacher, "hidden"), "base": (config.base, payload)}
    assert judges(load(), build_objective(load())).keys() == {"teacher"}
