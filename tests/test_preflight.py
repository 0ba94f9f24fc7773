import json
import shutil

import pytest

from megatron_opd import memory
from megatron_opd.config_file import load_config
from megatron_opd.preflight import check, preflight, render
from tests.home import make_home
from tests.tiny import qwen3
from tests.tokenizers import train_tokenizer


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with two models and ten prompts."""
    monkeypatch.chdir(tmp_path)
    return make_home(tmp_path)


def load(*overrides):
    return load_config(["config.yaml"], overrides)


def refusal(config, world=1, **how):
    """The one line with which a config is refused."""
    with pytest.raises(ValueError) as raised:
        preflight(config, world, **how)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_a_dataset_is_not_asked_for_is_idle_and_not_refused(home):
    warnings = check(load("rollout={engine: replay, n: 1, logprobs: 3, top_p: 0.9}"), 1)
    for name in ("logprobs", "top_p"):
        assert f"rollout.{name}: has no effect in this config" in warnings


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("{support: teacher_topk, k: 5}", "served by topk, 40 bytes a token"),
        ("{support: sampled, form: policy_gradient}", "served by sampled, 4 bytes a token"),
        ("{support: student_topk}", None),
    ],
)
def test_more_than_the_objective_wants_between_two_meshes_is_said(home, objective, told):
    own = ["parallel.tp=2", "teacher.parallel={tp: 1}", f"objective={objective}"]
    said = [line for line in check(load(*own), 2) if "between the meshes" in line]
    assert len(said) == (told is not None) and all(told in line for line in said)
    less = "topk" if "topk" in objective else "sampled"
    if told:
        assert check(load(*own, f"teacher.payload={less}"), 2) == []
    assert check(load(f"objective={objective}"), 1) == []


def test_the_plan_counts_steps_sequences_and_tokens(home):
    plan = preflight(load("parallel.tp=2", "train.epochs=3"), world=4)
    template = len(train_tokenizer(home / "again")("<|im_start|>user\n<|im_end|>\n").input_ids)
    template += len("assistant\n") + 1
    assert plan.longest_prompt == template + 10
    assert (plan.dp, plan.steps) == (2, 6)  # 3 passes of 10 // 4
    assert plan.sequences_per_replica == 4  # 4 prompts / 2 replicas × 2 responses
    assert plan.tokens_per_step == 8 * (plan.longest_prompt + 36)
    assert plan.microbatches == 4 // (128 // (plan.longest_prompt + 36))
    assert len(plan.prompts) == 10 and plan.held_out == [] and plan.warnings == []
    assert preflight(load("train.steps=2"), world=1).steps == 2
    assert sorted(path.name for path in home.iterdir()) == [
        "again",
        "config.yaml",
        "prompts.jsonl",
        "student",
        "teacher",
    ]


def test_the_table_says_what_a_user_wants_to_know(home):
    shutil.copy("prompts.jsonl", "held_out.jsonl")
    config = load("eval.prompts=[held_out.jsonl]", "optimizer.min_lr=1e-9", "parallel.tp=2")
    text = render(preflight(config, world=4))
    student = memory.count_parameters("student")
    assert f"student   {student:,} parameters, student" in text
    assert "10 for evaluation" in text and "4 = tp 2 × pp 1 × dp 2" in text
    assert "2 steps of 4 prompts × 2 responses, in runs/one" in text
    assert "optimizer states" in text and "key-value cache" in text
    assert text.endswith("warning: optimizer.min_lr: has no effect in this config")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("overrides", "world", "line"),
    [
        (["student.path=nowhere"], 1, "student.path: no directory 'nowhere'"),
        (["teacher.path=runs"], 1, "teacher.path: no directory 'runs'"),
        (["data.prompts=[gone.jsonl]"], 1, "data.prompts: no file 'gone.jsonl'"),
        (["eval.prompts=[gone.jsonl]"], 1, "eval.prompts: no file 'gone.jsonl'"),
        (["run.resume=true"], 1, "run.resume: no checkpoint in 'runs/one' to go on from"),
        (["run.dir=student"], 1, "run.dir: 'student' exists; set run.resume=true or choose"),
        (["run.dir=config.yaml"], 1, "run.dir: 'config.yaml' exists"),
        (["teacher.offload=true"], 1, "teacher.offload: needs a GPU"),
        (["optimizer.offload=true"], 1, "optimizer.offload: needs a GPU, and there is none; set"),
        (["parallel.tp=2"], 3, "parallel: tp=2 × pp=1 needs a multiple of 2 ranks, got 3"),
        (["parallel.tp=3"], 3, "tp=3 does not divide num_attention_heads=4"),
        (["parallel.pp=4"], 4, "pp=4 does not divide num_hidden_layers=2"),
        (["parallel.pp=2", "parallel.vpp=2"], 2, "pp × vpp=4 does not divide num_hidden_layers=2"),
        (["parallel.cp=2"], 3, "parallel: tp=1 × cp=2 × pp=1 needs a multiple of 2 ranks, got 3"),
        (["parallel.ep=2"], 2, "parallel.ep: got 2, but no model on this mesh has experts"),
        (["parallel.etp=1"], 2, "parallel.etp: got 1, but no model on this mesh has experts"),
        (["ddp.bucket_siz=9"], 1, "ddp.bucket_siz: not a field of DistributedDataParallelConfig"),
        ([], 8, "train.prompts_per_step: got 4, expected a multiple of 8, the data-parallel"),
        (["megatron.num_layer=3"], 1, "megatron.num_layer: not a field of TransformerConfig"),
        (
            ["rollout.max_tokens=300", "train.microbatch_tokens=1000"],
            1,
            "student.path: max_position_embeddings=256 of 'student', but data.max_prompt_tokens=64 "
            "+ rollout.max_tokens=300 = 364; lower one of them",
        ),
        (["objective.k=300"], 1, "objective.k: got 300, expected at most the 259 ids"),
        (["objective.k=1"], 1, "objective.k: got 1, expected 2 or more"),
        (
            ["objective.support=top"],
            1,
            "objective.support: got 'top', expected sampled, student_topk",
        ),
        (["objective.support=json:x"], 1, "objective.support: got 'json:x' (module 'json' has no"),
        (
            ["objective.weights={position_decay: {half: 3}}"],
            1,
            "objective.weights.position_decay: got 'half', expected half_life",
        ),
        (
            ["base={path: gone}", "objective.extrapolation=1.25"],
            1,
            "base.path: no directory 'gone'",
        ),
        (
            ["base={path: teacher, offload: true}", "objective.extrapolation=1.25"],
            1,
            "base.offload: needs a GPU, and there is none; set base.offload=false",
        ),
        (
            ["teacher.payload=topk"],
            1,
            "teacher.payload: got 'topk', but objective.support=student_topk wants more than "
            "teacher_topk; send hidden states",
        ),
        (
            ["rollout={engine: replay, n: 1}", "objective.support=rollout_topk"],
            1,
            "objective.support: got 'rollout_topk', which wants the ids that the engine found",
        ),
        (
            ["rollout={engine: replay, n: 1, correction: tis}"],
            1,
            "rollout.correction: got 'tis', expected none: no engine drew the responses "
            "(rollout.engine=replay)",
        ),
        (
            ["rollout={correction: mask, correction_low: 0}"],
            1,
            "rollout.correction_low: got 0, expected more than 0 and at most 1",
        ),
        (
            ["rollout={correction: tis, correction_high: 0.5}"],
            1,
            "rollout.correction_high: got 0.5, expected 1 or more",
        ),
        (
            ["data.max_prompt_tokens=20"],
            1,
            "9 of 10 prompts are longer than data.max_prompt_tokens=20",
        ),
        (["train.prompts_per_step=12"], 1, "train.prompts_per_step: got 12, expected at most"),
        (["optimizer.warmup_steps=2"], 1, "optimizer.warmup_steps: got 2, expected fewer than"),
        (["rollout.engine=replay", "rollout.n=1"], 1, "prompts.jsonl, row 0: no response"),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_nothing(home, overrides, world, line):
    before = sorted(home.rglob("*"))
    assert line in refusal(load(*overrides), world)
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config.json", "teacher.path: 'teacher' has no config.json"),
        ("tokenizer*", "teacher.path: 'teacher' has no tokenizer files"),
        ("model.safetensors", "teacher.path: 'teacher' has no *.safetensors weights"),
    ],
)
def test_a_model_directory_lacks_something(home, name, line):
    for file in (home / "teacher").glob(name):
        file.unlink()
    assert refusal(load()).startswith(line)


def test_weights_and_a_gpu_may_be_absent_when_only_planning(home):
    (home / "teacher" / "model.safetensors").unlink()
    away = ["teacher.offload=true", "optimizer.offload=true"]
    plan = preflight(load(*away), world=1, dry_run=True)
    keys = [line.split(":")[0] for line in plan.warnings]
    assert keys == ["teacher.path", "optimizer.offload", "teacher.offload"]


def test_random_weights_need_no_file(home):
    (home / "student" / "model.safetensors").unlink()
    assert check(load("student.init=random"), world=1) == []
    assert "student.path" in refusal(load())


def test_another_tokenizer_is_refused_or_allowed(home):
    train_tokenizer(home / "teacher", ["abab abab"] * 9, vocab_size=260)
    assert refusal(load()).startswith("teacher: 1 token ids differ from the student's (259: None")
    preflight(load("teacher.allow_tokenizer_mismatch=true"), world=1)


def test_the_base_is_checked_as_the_teacher_is(home):
    shutil.copytree(home / "teacher", home / "base")
    words = ["base.path=base", "objective.extrapolation=1.25"]
    assert f"base      {memory.count_parameters('base'):,} parameters, base" in render(
        preflight(load(*words), world=1)
    )
    train_tokenizer(home / "base", ["abab abab"] * 9, vocab_size=260)
    assert refusal(load(*words)).startswith(
        "base: 1 token ids differ from the student's (259: None"
    )
    assert "set base.allow_tokenizer_mismatch=true" in refusal(load(*words))
    (home / "base" / "model.safetensors").unlink()
    assert refusal(load(*words)).startswith("base.path: 'base' has no *.safetensors weights")


def test_weights_that_cannot_be_read_are_one_line(home):
    path = home / "teacher" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    assert "teacher/model.safetensors" in refusal(load())
    path.write_bytes(whole)
    (home / "teacher" / "config.json").write_text(json.dumps(qwen3(vocab_size=260)))  # 4 layers
    assert "model.layers.2" in refusal(load())


def test_a_broken_tokenizer_is_one_line(home):
    (home / "student" / "tokenizer.json").write_text("{")
    assert refusal(load()).startswith("student.path: no tokenizer in 'student' that can be read")


def test_tables_with_fewer_rows_than_tokens(home):
    config = json.loads((home / "teacher" / "config.json").read_text())
    (home / "teacher" / "config.json").write_text(json.dumps({**config, "vocab_size": 258}))
    assert refusal(load()).startswith(
        "teacher.path: vocab_size=258 of 'teacher', expected at least"
    )


def test_resuming_goes_on_where_there_is_a_checkpoint(home):
    (home / "runs" / "one").mkdir(parents=True)
    assert check(load(), world=1) == []  # empty: nothing to overwrite
    (home / "runs" / "one" / "metrics.jsonl").touch()
    assert refusal(load()).startswith("run.dir: 'runs/one' exists")
    assert refusal(load("run.resume=true")).startswith("run.resume: no checkpoint in 'runs/one'")
    (home / "runs" / "one" / "checkpoints" / "step_000001").mkdir(parents=True)
    assert check(load("run.resume=true"), world=1) == []


def test_only_the_student_answers_evaluation_prompts(home):
    assert check(load("eval.max_tokens=230"), world=1) == [
        "eval.max_tokens: has no effect in this config"
    ]
    words = ["eval.prompts=[prompts.jsonl]", "eval.max_tokens=230"]
    assert "eval.max_tokens=230 = 294; lower one of them" in refusal(load(*words))


def test_preflight_sees_what_megatron_will_be_asked_for(home):
    words = ["train.recompute=selective", "megatron.recompute_num_layers=2"]
    assert "recompute" in refusal(load(*words))


def test_an_index_without_its_shards_is_no_weights(home):
    (home / "teacher" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (home / "teacher" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "teacher.path: 'teacher' has no *.safetensors weights" in refusal(load())
    plan = preflight(load(), world=1, dry_run=True)
    assert plan.warnings == ["teacher.path: 'teacher' has no *.safetensors weights"]


def test_a_tokenizer_that_loses_spaces_is_refused(home):
    (home / "prompts.jsonl").write_text('{"prompt": "Find the sum", "answer": "1"}\n' * 10)
    assert preflight(load(), world=1).steps == 2
    for name in ("student", "teacher"):
        path = home / name / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
        path.write_text(json.dumps(tokenizer))
    assert "loses the spaces of '<|im_start|>user" in refusal(load())


RL = "{support: sampled, form: policy_gradient, divergence: outcome}"
SFT = "{support: sampled, divergence: cross_entropy}"
TOKENS = "{support: sampled, form: policy_gradient, group_normalize: std}"
DRAWN = "{support: sampled, form: policy_gradient}"
REPLAY = "rollout={engine: replay, n: 1}"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["teacher=null"], "teacher: missing, but objective.divergence=reverse_kl asks one"),
        ([f"objective={SFT}"], "teacher: set, but objective.divergence=cross_entropy asks none"),
        (
            [f"objective={RL}", "reward.function=math"],
            "teacher: set, but objective.divergence=outcome asks none; set teacher=null",
        ),
        (
            [f"objective={SFT}", "teacher=null", "terms.kd={k: 4}"],
            "teacher: missing, but terms.kd.divergence=reverse_kl asks one",
        ),
        (["objective.extrapolation=1.25"], "base: missing, but objective.extrapolation=1.25 asks"),
        (["base={path: teacher}"], "base: set, but objective.extrapolation=1.0 asks none"),
        (
            ["schedules={objective.extrapolation: {start: 1.0, end: 1.5, steps: 9}}"],
            "base: missing, but objective.extrapolation=1.5 asks one",
        ),
        (
            [f"objective={RL}", "teacher=null"],
            "reward.function: missing, but objective.divergence=outcome wants to know",
        ),
        (
            [f"terms.rl={RL}"],
            "reward.function: missing, but terms.rl.divergence=outcome wants to know",
        ),
        (
            ["objective.weights={correct_only: {}}"],
            "reward.function: missing, but objective.weights.correct_only wants",
        ),
        (["reward.function=maths"], "reward.function: got 'maths' "),
        (
            [f"objective={SFT}", "teacher=null", REPLAY, "objective.weights={correct_only: {}}"],
            "prompts.jsonl, row 0: no response",
        ),
        ([REPLAY, f"objective={DRAWN}"], "objective.support: got 'sampled', whose reverse_kl is"),
        (
            ["rollout.data_fraction=0.5", f"terms.rl={RL}", "reward.function=math"],
            "terms.rl.support: got 'sampled', whose outcome is a mean over tokens that",
        ),
        (
            ["objective.weights={data_only: {}}"],
            "objective.weights.data_only: tells drawn responses from the dataset's, but all",
        ),
        (
            [f"objective={TOKENS}"],
            "teacher.payload: got 'hidden', expected sampled with objective.group_normalize",
        ),
        (
            ["terms.a.veto=2.0"],
            "terms.a.veto: got 2, expected 0 or more and less than 1",
        ),
        (
            ["schedules={objective.veto: {start: 0.5, end: 1.0, steps: 5}}"],
            "objective.veto: got 1, expected 0 or more and less than 1",
        ),
        (
            ["schedules={objective.vet: {start: 0.5, end: 0.0, steps: 5}}"],
            "schedules.objective.vet: no such number, expected one of objective, of terms.NAME, "
            "or rollout.data_fraction; did you mean objective.veto?",
        ),
        (["terms.total={}"], "terms: got 'total', expected a name"),
        (["terms.kd.k=1000"], "terms.kd.k: got 1000, expected at most the 259 ids"),
        (
            ["schedules={rollout.data_fraction: {start: 0.0, end: 2.0, steps: 5}}"],
            "schedules, at step 6: rollout.data_fraction: Input should be less than or equal to 1",
        ),
        (
            ["teacher.payload=topk", "objective.support=teacher_topk", "terms.kd.support=full"],
            "teacher.payload: got 'topk', but terms.kd.support=full wants more than teacher_topk",
        ),
    ],
)
def test_what_losses_want_and_nobody_gives(home, overrides, line):
    told = refusal(load(*overrides))
    assert told.startswith(line), told


@pytest.mark.parametrize(
    "overrides",
    [
        [f"objective={RL}", "teacher=null", "reward.function=math"],
        [f"objective={RL}", "reward.function=math", "objective.weights={rlsd: {}}"],
        [f"objective={TOKENS}", "teacher.payload=sampled"],
        [f"objective={DRAWN}", "objective.outcome=1.0", "reward.function=exact_match"],
        [f"terms.rl={RL}", "terms.rl.weight=0.1", "reward.function=math"],
        [f"objective={DRAWN}", f"terms.ce={SFT}"],
    ],
)
def test_losses_that_get_what_they_want(home, overrides):
    assert preflight(load(*overrides), world=1).warnings == []


def test_a_response_that_is_alone_is_compared_with_nobody(home):
    (line,) = check(
        load(f"objective={RL}", "teacher=null", "reward.function=math", "rollout.n=1"), 1
    )
    assert line.startswith("rollout.n=1: a response has no other to be compared with")
