import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_opd.config import Config, resolve, sections, to_yaml
from megatron_opd.config_file import load_config
from megatron_opd.config_rules import cautions
from megatron_opd.loss import Objective

MINIMAL = """
student: {path: small}
teacher: {path: big}
data: {prompts: [math.parquet]}
"""


@pytest.fixture
def load(tmp_path):
    """Load the minimal config with overrides."""
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return lambda *overrides: load_config([path], overrides)


@pytest.fixture
def refusal(load):
    """The one line with which overrides are refused."""

    def line(*overrides):
        with pytest.raises(ValueError) as raised:
            load(*overrides)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return line


def test_the_defaults_are_those_of_the_paper(load):
    config = load()
    objective, rollout = config.objective, config.rollout
    assert (objective.support, objective.divergence, objective.k) == (
        "student_topk",
        "reverse_kl",
        16,
    )
    assert (rollout.n, rollout.temperature, rollout.max_tokens) == (4, 1.0, 7168)
    assert (config.train.prompts_per_step, config.data.max_prompt_tokens) == (64, 1024)
    assert (config.optimizer.lr, config.optimizer.schedule) == (1e-6, "constant")
    assert cautions(config) == []


def test_files_merge_left_to_right_then_overrides(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(MINIMAL + "optimizer: {lr: 1e-4, eps: 1e-5}\nmegatron: {a: 1}")
    two.write_text("optimizer: {lr: 2e-5}\nmegatron: {b: {c: 2}}\ndata: {prompts: [x.jsonl]}")
    overrides = ["optimizer.lr=3.5e-6", "data.prompts=[y.jsonl, z.jsonl]", "megatron.b.d=true"]
    config = load_config([one, two], overrides)
    assert (config.optimizer.lr, config.optimizer.eps) == (3.5e-6, 1e-5)
    assert config.data.prompts == ("y.jsonl", "z.jsonl")
    assert config.megatron == {"a": 1, "b": {"c": 2, "d": True}}
    assert load_config([one, two]).optimizer.lr == 2e-5
    assert load_config([two, one]).optimizer.lr == 1e-4


@pytest.mark.parametrize("written", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-06", "1.e-6"])
def test_numbers_in_every_spelling(load, written):
    assert load(f"optimizer.lr={written}").optimizer.lr == 1e-6


def test_a_resolved_config_loads_to_itself(load, tmp_path):
    config = load("optimizer.betas=[0.8, 0.9]", "megatron={x: [1, a]}", "run.wandb=opd")
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    again = load_config([tmp_path / "resolved.yaml"])
    assert again == config and "timeout_minutes" in to_yaml(config)


def test_a_config_cannot_change(load):
    with pytest.raises(ValidationError, match="frozen"):
        load().optimizer.lr = 1.0


def test_a_schedule_can_be_a_word(load):
    """Its key has dots of its own: in braces, or as a word a schedule or one field of it."""
    whole = load("schedules={objective.veto: {start: 0.5, end: 0.0, steps: 5}}").schedules
    words = ["schedules.objective.veto={start: 0.5, end: 0.1, steps: 5}"]
    assert load(*words, "schedules.objective.veto.end=0.0").schedules == whole
    assert list(whole) == ["objective.veto"]


def test_a_section_can_be_taken_away(load):
    hard = ("teacher=null", "objective.divergence=cross_entropy", "objective.support=sampled")
    assert load(*hard).teacher is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimiser.lr=1", "optimiser: no such key; did you mean optimizer?"),
        ("optimizer.lrr=1", "optimizer.lrr: no such key; did you mean optimizer.lr?"),
        ("terms.kd.suport=full", "terms.kd.suport: no such key; did you mean terms.kd.support?"),
        ("teachers.m.pth=x", "teachers.m.pth: no such key; did you mean teachers.m.path?"),
        ("max_tokens=10", "max_tokens: no such key; did you mean rollout.max_tokens?"),
        (
            "data.max_prompts_tokens=3",
            "data.max_prompts_tokens: no such key; did you mean data.max_prompt_tokens?",
        ),
        ("zzz=1", "zzz: no such key; --help lists every key"),
        ("rollout.n=x", 'rollout.n: got "x", expected integer'),
        ("rollout.n=1.5", "rollout.n: got 1.5, expected integer"),
        ("rollout.n=true", "rollout.n: got true, expected integer"),
        ("rollout.n=0", "rollout.n: got 0, expected greater than or equal to 1"),
        ("optimizer.lr='1e-6'", 'optimizer.lr: got "1e-6", expected number'),
        ("optimizer.lr=.inf", "optimizer.lr: got Infinity, expected a finite number"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas[1]: got 1, expected less than 1"),
        ("student.init=pt", "student.init: got \"pt\", expected 'hf' or 'random'"),
        (
            "rollout.correction=clip",
            "rollout.correction: got \"clip\", expected 'none', 'tis', 'icepop' or 'mask'",
        ),
        ("student=null", "student: got null, expected a section"),
        ("student.path.x=1", "student.path: got a section, expected string"),
        ("teacher.dtype=fp8", "teacher.dtype: got \"fp8\", expected 'bfloat16' or 'float32'"),
        ("data.prompts=x.parquet", 'data.prompts: got "x.parquet", expected a list'),
        ("data.prompts=[]", "data.prompts: got [], expected at least 1"),
        ("megatron=[1]", "megatron: got [1], expected a section"),
        ("run.wandb=true", "run.wandb: got true, expected string"),
        ("seed", "'seed': expected section.key=value"),
        ("a..b=1", "'a..b=1': expected section.key=value"),
        ("optimizer.lr=[", "optimizer.lr, line 1: not YAML: "),
    ],
)
def test_a_mistake_is_one_line(refusal, override, line):
    assert refusal(override).startswith(line)


def test_of_several_mistakes_the_first_is_told_and_the_others_are_counted(refusal):
    line = refusal("rollout.n=0", "rollout.top_p=2", "train.stepz=3")
    # an unknown key goes first: it is often why another one is missing
    assert line == "train.stepz: no such key; did you mean train.steps? (and 2 more errors)"
    assert refusal("rollout.n=0", "rollout.top_p=2").endswith("(and 1 more error)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nseed: 2", "line 2: not YAML: 'seed' is there twice"),
        ("run: {keep: 1, keep: 2}", "'keep' is there twice"),
        ("- a", "got a list, expected `key: value` lines"),
        ("seed: [", "not YAML"),
        ("seed: \x01", "not YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, line):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        load_config([path])
    told = str(raised.value)
    assert str(path) in told and line in told and "\n" not in told


def test_a_binary_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"model.bin: not a text file, expected YAML"):
        load_config([tmp_path / "model.bin"])


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(ValueError, match=r"config: no file '.*absent.yaml'"):
        load_config([tmp_path / "absent.yaml"])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"student: missing; it has no default \(and 1 more"):
        load_config([tmp_path / "empty.yaml"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["rollout.mask_format='('"],
            "rollout.mask_format: got '(', expected a regular expression: missing )",
        ),
        (["rollout.temperature=0"], "rollout.temperature: got 0, expected more than 0"),
        (["rollout.engine=replay"], "rollout.n: got 4, expected 1 with rollout.engine=replay"),
        (
            ["train.microbatch_tokens=8191"],
            "train.microbatch_tokens: got 8191, expected at least 8192",
        ),
        (["optimizer.min_lr=1e-3"], "optimizer.min_lr: got 0.001, expected at most"),
        (["parallel.tp=4", "rollout.tp=3"], "rollout.tp: got 3, expected a divisor of parallel.tp"),
        (["rollout.engine=vllm_server"], "rollout.url: missing, but rollout.engine=vllm_server"),
        (
            ["rollout={engine: vllm, async_depth: 1}"],
            "rollout.async_depth: got 1, expected 0 with rollout.engine=vllm: only a server",
        ),
        (
            ["teacher={kind: server, payload: topk}"],
            "teacher.url: missing, but teacher.kind=server",
        ),
        (
            ["teacher={kind: server, url: http://x}"],
            "teacher.payload: got 'hidden', expected topk or sampled with teacher.kind=server",
        ),
        (
            [
                "teacher={kind: server, url: http://x, payload: topk}",
                "objective={support: teacher_topk, teacher_temperature: 2.0}",
            ],
            "objective.teacher_temperature: got 2, expected 1 with teacher.kind=server",
        ),
        (
            ["teacher={kind: server, url: http://x, payload: topk, offload: true}"],
            "teacher.offload: got true, but the server",
        ),
        (
            ["teacher={kind: server, url: http://x, payload: topk, parallel: {tp: 2}}"],
            "teacher.parallel: set, but kind=server is split as it was started",
        ),
        (
            ["teacher={path: null, weights: ema, parallel: {tp: 2}}"],
            "teacher.parallel: set, but with weights=ema the teacher is split as the student is",
        ),
        (
            ["base={path: big, parallel: {vpp: 2}}"],
            "base.parallel.vpp: got 2, expected 1 with base",
        ),
        (["teacher.parallel.cp=2"], "teacher.parallel.cp: no such key; did you mean parallel.cp?"),
        (["teachers={a: {path: big}}"], "teachers: set, and teacher too, which would judge every"),
        (
            ["teacher=null", "teachers={1x: {path: big}}"],
            "teachers: got the name '1x', expected letters, digits",
        ),
        (["teacher.path=null"], "teacher.path: missing; name a directory, or set teacher.weights"),
        (
            ["teacher=null", "teachers={a: {dtype: float32}}"],
            "teachers.a.path: missing; name a directory, or set teachers.a.weights",
        ),
        (
            ["teacher.weights=ema"],
            "teacher.path: got 'big', expected none with weights=ema: network and weights are the "
            "student's; set teacher.path=null",
        ),
        (
            ["teacher={path: null, weights: live, kind: server, url: http://x, payload: topk}"],
            "teacher.weights: got 'live', expected file with kind=server",
        ),
        (
            ["teacher={path: null, weights: live, dtype: float32}"],
            "teacher.dtype: got 'float32', expected null with weights=live",
        ),
        (
            ["teacher={path: null, weights: live, offload: true}"],
            "teacher.offload: got true, expected false with weights=live",
        ),
        (
            ["teacher={template: opsd, max_prompt_tokens: 3000}", "train.microbatch_tokens=10000"],
            "train.microbatch_tokens: got 10000, expected at least 10168 = the longest teacher",
        ),
        (["base={dtype: float32}"], "base.path: missing"),
        (["data.weights=[0.7, 0.3]"], "data.weights: got 2, expected 1: one for each file"),
        (
            ["data.weights=[1]", "data.schedule=one_total"],
            "data.weights: set, but data.schedule=one_total shows one prompt for ever",
        ),
        (
            ["data.schedule=one_per_batch", "rollout={engine: replay, n: 1}"],
            "data.schedule: got 'one_per_batch', whose copies of a prompt differ in their samples",
        ),
        (["eval.every=5"], "eval.prompts: empty, but eval.every"),
        (["eval.n=4"], "eval.n: got 4, expected 1 with eval.temperature=0"),
    ],
)
def test_values_that_exclude_each_other(refusal, overrides, line):
    assert refusal(*overrides).startswith(line)


@pytest.mark.parametrize(
    "overrides",
    [
        ["base={path: start, offload: true}", "objective.extrapolation=1.25"],
        ["objective.weights={position_decay: {half_life: 3.0}, my_weights:decay: {}}"],
        ["rollout={correction: icepop, correction_low: 0.8, correction_high: 1.25}"],
        ["rollout.mask_format='boxed\\{.*\\}'", "rollout.mask_truncated=true"],
        ["objective.support=full", "rollout.engine=replay", "rollout.n=1", "rollout.temperature=0"],
        ["train.microbatch_tokens=8192"],
        ["rollout={engine: vllm_server, url: http://x, async_depth: 1}"],
        ["rollout={engine: vllm, tp: 2}", "parallel.tp=4", "vllm={block_size: 32}"],
        ["teacher={kind: server, url: http://x, payload: topk}", "objective.support=teacher_topk"],
        ["eval.n=4", "eval.temperature=0.7"],
    ],
)
def test_values_that_agree(load, overrides):
    load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["optimizer.min_lr=1e-8"], ["optimizer.min_lr: has no effect"]),
        (["optimizer.min_lr=1e-8", "optimizer.schedule=cosine"], []),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel: has no effect"]),
        (["parallel.sequence_parallel=true", "parallel.tp=2"], []),
        (["eval.reward=math"], ["eval.reward: has no effect"]),
        (["run.keep=3"], ["run.keep: has no effect"]),
        (["teacher.ema_rate=0.1"], ["teacher.ema_rate: has no effect"]),
        (["teacher.max_prompt_tokens=9"], ["teacher.max_prompt_tokens: has no effect"]),
        (
            ["teacher.parallel={pp: 2, sequence_parallel: true}"],
            ["teacher.parallel.sequence_parallel: has no effect"],
        ),
        (
            ["teacher=null", "teachers={a: {path: big, retries: 1}}"],
            ["teachers.a.retries: has no effect"],
        ),
        (
            ["teacher={path: null, weights: live}"],
            ["teacher.weights=live: the teacher is the student and reads what it reads"],
        ),
        (["train.steps=3", "train.epochs=2"], ["train.epochs: has no effect"]),
        (["rollout.top_p=0.9"], ["rollout.top_p=0.9, rollout.top_k=0: responses come from"]),
        (["rollout.tp=1", "vllm={}"], []),
        (["parallel.tp=2", "rollout.tp=2"], ["rollout.tp: has no effect"]),
        (["vllm.block_size=16"], ["vllm: has no effect"]),
        (["rollout={engine: vllm, url: http://x}"], ["rollout.url: has no effect"]),
        (["rollout={engine: vllm_server, url: http://x, retries: 9}"], []),
        (["teacher.timeout_s=5"], ["teacher.timeout_s: has no effect"]),
        (
            ["rollout={correction_low: 0.8, correction_high: 3.0}"],
            ["rollout.correction_low: has no effect", "rollout.correction_high: has no effect"],
        ),
        (
            ["rollout={correction: tis, correction_low: 0.8, correction_high: 3.0}"],
            ["rollout.correction_low: has no effect"],
        ),
        (["rollout={correction: mask, correction_low: 0.8, correction_high: 3.0}"], []),
        (
            ["rollout.temperature=0.5", "objective.support=sampled"],
            ["rollout.temperature=0.5, objective.student_temperature=1: the sampled-token"],
        ),
        (
            ["rollout.engine=replay", "rollout.n=1", "rollout.top_p=0.9", "rollout.batch_size=3"],
            ["rollout.top_p: has no effect", "rollout.batch_size: has no effect"],
        ),
        (["data.weights=[1]"], ["data.weights: has no effect"]),
        (["objective.jsd_beta=0.3"], ["objective.jsd_beta: has no effect"]),
        (["objective.jsd_beta=0.3", "objective.divergence=jsd"], []),
        (["objective.skew_alpha=0.3"], ["objective.skew_alpha: has no effect"]),
        (["objective.skew_alpha=0.3", "objective.divergence=skew_kl"], []),
        (
            ["objective={form: policy_gradient, reward_weight: none}"],
            [],
        ),
        (["objective.reward_weight=none"], ["objective.reward_weight: has no effect"]),
        (
            [
                "objective={form: policy_gradient, reward_weight: none, support: sampled}",
                "objective.normalize=vocab",
            ],
            ["objective.normalize: has no effect", "objective.reward_weight: has no effect"],
        ),
        (["objective.estimator=k2"], ["objective.estimator: has no effect"]),
        (["objective.estimator=k2", "objective.support=sampled"], []),
        (["terms.kd={estimator: k2, jsd_beta: 0.3}"], ["terms.kd.jsd_beta", "terms.kd.estimator"]),
        (
            ["rollout.temperature=0.5", "terms.rl={support: sampled, divergence: outcome}"],
            ["rollout.temperature=0.5, terms.rl.student_temperature=1: the sampled-token"],
        ),
        (["reward.normalize=mean"], ["reward.normalize: has no effect"]),
        (["reward={function: math, normalize: mean}"], []),
        (["objective.support=full", "objective.k=8"], []),  # of the metrics
        (["objective.temperature_squared=true"], ["objective.temperature_squared: has no effect"]),
        (
            [
                "teacher=null",
                "objective={divergence: cross_entropy, support: sampled, k: 8}",
            ],
            ["objective.k: has no effect"],
        ),
        (
            ["data.chat_template=none", "data.chat_template_kwargs={a: 1}"],
            ["data.chat_template_kwargs: has no effect"],
        ),
    ],
)
def test_cautions_name_what_is_ignored_and_what_is_seldom_meant(load, overrides, lines):
    found = cautions(load(*overrides))
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_every_key_has_its_sentence():
    for name, kind in sections().items():
        assert kind.__doc__
        for key, field in kind.model_fields.items():
            if key not in sections():
                assert field.description and field.description.endswith("."), f"{name}.{key}"


def test_resolve_finds_built_ins_and_attributes():
    assert resolve("key", "two", {"two": 2}) == 2
    assert resolve("key", "json:dumps", {}).__name__ == "dumps"
    for name in ("three", "json:nothing", "no_such_module:x", ":", ""):
        with pytest.raises(ValueError, match=r"^key: .*expected one of two, or module:attr"):
            resolve("key", name, {"two": 2})
    with pytest.raises(ValueError, match=r"^key: got 'json:nothing' .*expected module:attr"):
        resolve("key", "json:nothing", {})


def test_the_config_needs_no_torch():
    script = "import sys, megatron_opd.__main__; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 0


def test_config_is_the_root_of_sections():
    assert sections()[""] is Config and list(sections())[1:3] == ["student", "teacher"]


def test_what_the_loss_gets_is_named_as_it_names_it():
    """Every option of the objective is one of the loss, which is told the rest by `build`."""
    ours = {field.name for field in dataclasses.fields(Objective)}
    corrections = {"correction", "correction_low", "correction_high"}
    told = {"name", "rollout_temperature", "position_bucket", "max_tokens"} | corrections
    section, rollout = (sections()[name].model_fields for name in ("objective", "rollout"))
    assert ours - told == set(section)
    known = section | {name: rollout[name] for name in corrections}
    defaults = {name: field.default for name, field in known.items()}
    assert defaults == {name: getattr(Objective(), name) for name in known}
