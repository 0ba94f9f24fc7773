"""The loop with several teachers, with the student as its own, and with other prompts for them."""

import json
from pathlib import Path

import pytest

from megatron_opd.config_file import load_config
from megatron_opd.preflight import preflight, render
from tests.test_train import QUICK, assert_resumes_exactly, make_home, records, run

TEACHERS = (
    "{math: {path: teacher}, code: {weights: ema, ema_rate: 0.2, template: sdft, "
    "max_prompt_tokens: 250}}"
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home whose prompts take turns between two teachers."""
    monkeypatch.chdir(make_home(tmp_path))
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["teacher"], row["other"] = ("math", "code")[index % 2], ("math", "chess")[index % 2]
    write(rows)
    return tmp_path


def write(rows):
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def several(*words):
    return ["teacher=null", f"teachers={TEACHERS}", "train.microbatch_tokens=280", *words]


def test_several_teachers_resume_exactly(home):
    quiet = ["eval.prompts=[]", "eval.every=0", "run.tensorboard=false"]
    whole = assert_resumes_exactly(*several("parallel.tp=2", "data.shuffle=false", *quiet))
    for record in whole:
        for name in ("teacher/nll", "teacher/entropy", "distill/reverse_kl", "loss/objective"):
            low, high = sorted((record[f"{name}@code"], record[f"{name}@math"]))
            assert low < record[name] < high
        assert 0 < record["teacher/ema_distance@code"] < 1
        assert "teacher/ema_distance" not in record
    assert whole[0]["distill/reverse_kl@code"] > 1e-3  # the student's own network, told more


@pytest.mark.parametrize("weights", ["student", "live", "ema"])
def test_the_student_is_its_own_teacher(home, weights):
    """After the same prompt it has nothing to say at first, and something after another one."""
    own = [*QUICK, f"teacher={{path: null, weights: {weights}}}"]
    run(1, *own, "run.dir=runs/plain")
    first, *later = records(Path("runs/plain"))
    assert abs(first["loss/objective"]) < 1e-6 and first["optim/grad_norm"] < 1e-4
    assert all(abs(r["distill/reverse_kl"]) < 1e-6 for r in later) == (weights == "live")
    assert ("teacher/ema_distance" in first) == (weights == "ema")
    told = ["teacher={template: opsd, max_prompt_tokens: 250}", "train.microbatch_tokens=280"]
    run(1, *own, *told, "run.dir=runs/told")
    assert records(Path("runs/told"))[0]["loss/objective"] > 1e-3


@pytest.mark.parametrize(
    ("layout", "own"), [("{}", "{tp: 2}"), ("{tp: 2, sequence_parallel: true}", "{pp: 2}")]
)
def test_judges_on_meshes_of_their_own_change_nothing(home, layout, own):
    """One of two teachers, and the base."""
    words = several(*QUICK, "base={path: teacher}", "objective.extrapolation=1.25")
    words += [f"parallel={layout}", "run.save_rollouts_every=0"]
    run(2, *words, "run.dir=runs/shared")
    run(2, *words, f"teachers.math.parallel={own}", f"base.parallel={own}")
    for one, other in zip(records(Path("runs/shared")), records(Path("runs/one")), strict=True):
        assert other.pop("teacher/bytes_per_token") > 4
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["teachers.math.parallel.tp=3"],
            "teachers.math.parallel: tp=3 × pp=1 needs a multiple of 3 ranks, got 1; change "
            "--nproc-per-node or teachers.math.parallel.tp / teachers.math.parallel.pp",
        ),
        (
            ["data.teacher_key=other"],
            "prompts.jsonl, row 1: data.teacher_key='other' gives 'chess', expected one of math",
        ),
        (
            ["teachers.go={weights: live}"],
            "teachers.go: no row of data.prompts has it in its column data.teacher_key='teacher'",
        ),
        (
            ["data.teacher_key=domain"],
            "prompts.jsonl, row 0: no teacher; name one of math, code in the column data.teacher",
        ),
        (
            ["teachers.code.template=missing.txt"],
            "teachers.code.template: got 'missing.txt', expected one of opsd, sdft, or a text file",
        ),
        (
            ["teachers.code.max_prompt_tokens=9"],
            "5 of 5 prompts are longer than teachers.code.max_prompt_tokens=9; the longest has",
        ),
        (
            ["teachers.code.chat_template_kwargs={enable_thinkin: false}"],
            "teachers.code.chat_template_kwargs.enable_thinkin: the chat template of 'student' has",
        ),
        (
            ["teachers.code.max_prompt_tokens=1020", "train.microbatch_tokens=2000"],
            "teachers.code.path: max_position_embeddings=1024 of 'student', but teachers.code.max_"
            "prompt_tokens=1020 + rollout.max_tokens=12 = 1032; lower one of them",
        ),
        (["teachers.math.path=none"], "teachers.math.path: no directory 'none'"),
        (["data.response_key=nowhere"], "no response, which teachers.code.template tells the"),
        (
            ["teachers.math.payload=topk"],
            "teachers.math.payload: got 'topk', but objective.support=student_topk wants more",
        ),
        (["teachers.math.offload=true"], "teachers.math.offload: needs a GPU"),
    ],
)
def test_what_is_wrong_with_teachers_is_one_line_before_a_model_is_loaded(home, words, line):
    with pytest.raises(ValueError) as raised:
        preflight(load_config(["config.yaml"], several(*words)), 1)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_prompts_that_are_too_long_for_their_teacher_are_dropped_and_counted(home):
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    rows[3]["response"] = "long " * 100
    write(rows)
    plan = preflight(load_config(["config.yaml"], several("data.too_long=drop")), 1)
    assert len(plan.prompts) == 9 and [prompt.index for prompt in plan.prompts][3] == 4
    assert any("1 of 5 prompts are longer than teachers.code.max" in w for w in plan.warnings)
    text = render(plan)
    assert "teachers.math weights" in text and "teachers.code weights" in text
    assert max(map(len, text.splitlines()[:-1])) <= 100


def test_a_column_of_teachers_means_nothing_to_a_single_one(home):
    plan = preflight(load_config(["config.yaml"], []), 1)
    assert {prompt.teacher for prompt in plan.prompts} == {""}
