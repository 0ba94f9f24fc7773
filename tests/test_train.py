"""The loop as users run it: on-policy and replay jobs, killed and resumed, on real prompts."""

import json
import logging
import os
import re
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_opd import parallel as mesh
from megatron_opd import train
from megatron_opd.clock import Clock
from megatron_opd.config_file import load_config
from megatron_opd.job import Job
from megatron_opd.preflight import check
from megatron_opd.step import train_step
from tests.distributed import run_ranks
from tests.hf import hf_model
from tests.tokenizers import train_tokenizer

DAPO = Path(__file__).parents[2] / "shared/data/dapo-math-17k-boxed.parquet"
CONFIG = """
student: {path: student, dtype: float32}
teacher: {path: teacher}
data: {prompts: [prompts.jsonl], max_prompt_tokens: 64, shuffle: true}
rollout: {n: 2, max_tokens: 12, batch_size: 5}
objective: {k: 8, chunk_tokens: 16}
metrics: {token_fraction: 1.0}
optimizer: {lr: 3.0e-3, warmup_steps: 2, schedule: cosine}
train: {prompts_per_step: 4, steps: 5, microbatch_tokens: 128}
eval: {prompts: [prompts.jsonl], every: 2}
run: {dir: runs/one, save_every: 1, save_rollouts_every: 2, tensorboard: true}
"""


def make_home(
    folder: Path,
    texts=(),
    vocab_size=300,
    *,
    head_dim=12,
    spare_rows=3,
    layers=2,
    student="qwen3_tied",
    teacher="qwen3_tied",
) -> Path:
    """Write two real tiny models with their tokenizer, prompts with responses, and a config."""
    families = {"student": student, "teacher": teacher}
    for name, depth, seed in (("student", layers, 1), ("teacher", 4, 2)):
        tokenizer = train_tokenizer(folder / name, texts, vocab_size=vocab_size)
        shape = dict(
            vocab_size=len(tokenizer) + spare_rows,
            num_hidden_layers=depth,
            hidden_size=16 * depth,
            **({} if "deepseek" in families[name] else {"head_dim": head_dim}),  # its own
        )
        model = hf_model(families[name], seed=seed, max_position_embeddings=1024, **shape)
        model.save_pretrained(folder / name)
    rows = [
        {"prompt": f"{a} + {a + 1} =", "answer": f"{2 * a + 1}", "response": f"{2 * a + 1}"}
        for a in range(10)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_home(tmp_path)


def _main(rank, overrides):
    logging.getLogger("megatron_opd").setLevel(logging.INFO)  # as the command line does
    train.main(load_config(["config.yaml"], overrides))


def run(world, *overrides):
    run_ranks(_main, world, list(overrides))


def records(folder):
    """Read metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines
    ]


def exported(folder, step=5):
    return load_file(folder / f"hf/step_{step:06d}/model.safetensors")


def assert_resumes_exactly(*words) -> list:
    """Run four steps, take the last two back, resume; return the records of the whole run."""
    folder, words = Path("runs/one"), [*words, "train.steps=4", "run.keep=9"]
    run(2, *words)
    whole, weights = records(folder), exported(folder, 4)
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoints/step_{step:06d}")
    shutil.rmtree(folder / "hf")
    run(2, *words, "run.resume=true")
    assert records(folder) == whole
    again = exported(folder, 4)
    assert all((again[name] == weights[name]).all() for name in weights)
    return whole


def test_a_run_leaves_what_it_should(home):
    run(2, "parallel.tp=2")
    folder = Path("runs/one")
    history = records(folder)
    assert [r["step"] for r in history] == [0, 1, 2, 3, 4, 5]
    assert ["eval/accuracy" in r for r in history] == [True, False, True, False, True, True]
    for record in history[1:]:
        assert record["policy/mismatch_max"] < 1e-4  # engine and trainer agree
        assert 0 < record["distill/overlap_ratio"] < 1 and record["distill/reverse_kl"] > 0
        assert record["distill/overlap_mass_student"] > 0 > record["distill/overlap_advantage"]
        assert record["rollout/response_tokens"] <= 12 and record["rollout/masked_fraction"] == 0
        wanted = {"student/entropy", "teacher/entropy", "distill/entropy_gap", "optim/grad_norm"}
        assert wanted <= record.keys()
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step_000004",
        "step_000005",
    ]
    rows = [json.loads(x) for x in (folder / "rollouts/step_000004.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["tokens"] <= 12 and row["logp_mean"] < 0 for row in rows)
    assert any(path.name.startswith("events") for path in folder.rglob("*"))
    assert load_config([folder / "config.yaml"]).parallel.tp == 2
    loaded = AutoModelForCausalLM.from_pretrained(folder / "hf/step_000005")
    assert loaded.config.vocab_size == 259 + 3 and loaded.dtype == torch.float32


def _die_after(rank, overrides, mark):
    """Run, and be killed some time after the file `mark` appears: no clean-up of any kind."""

    def watch():
        while not Path(mark).exists():
            time.sleep(0.002)
        time.sleep(0.01 * rank)
        os.kill(os.getpid(), 9)

    threading.Thread(target=watch, daemon=True).start()
    _main(rank, overrides)


@pytest.mark.parametrize(
    "layout", [["parallel.tp=2"], ["parallel.pp=2"], []], ids=["tp2", "pp2", "dp2"]
)
def test_a_killed_run_resumes_bit_by_bit(home, layout):
    run(2, *layout, "run.dir=runs/whole")
    broken = [*layout, "run.dir=runs/broken"]
    mark = "runs/broken/checkpoints/step_000002/state.json"
    with pytest.raises(RuntimeError, match="failed"):
        run_ranks(_die_after, 2, broken, mark)
    assert not Path("runs/broken/hf").exists()
    run(2, *broken, "run.resume=true")
    assert records(Path("runs/broken")) == records(Path("runs/whole"))
    one, other = exported(Path("runs/broken")), exported(Path("runs/whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_a_finished_run_changes_nothing_but_the_clock(home):
    run(1)
    before = records(Path("runs/one"))
    run(1, "run.resume=true")
    assert records(Path("runs/one")) == before


def test_an_export_that_exists_is_found_before_training(home):
    run(1, "run.save_every=2", "train.steps=3")
    shutil.rmtree("runs/one/checkpoints/step_000003")
    with pytest.raises(RuntimeError, match=r"run.export: 'runs/one/hf/step_000003' exists"):
        run(1, "run.save_every=2", "train.steps=3", "run.resume=true")


def test_a_resumed_run_says_what_is_another_than_before(home):
    run(1, "train.steps=3")
    run(1, "train.steps=4", "rollout.n=1", "run.resume=true", "run.save_every=0")
    text = Path("runs/one/log.txt").read_text()
    assert "resumed with another config: rollout.n was 2, is 1" in text
    assert "resumed with another config: train.steps was 3, is 4" in text


def test_replay_is_supervised_training(home):
    supervised = [
        "teacher=null",
        "rollout.engine=replay",
        "rollout.n=1",
        "objective.support=sampled",
        "objective.divergence=cross_entropy",
        "train.steps=60",
        "optimizer.lr=1e-2",
        "eval.every=0",
        "run.save_every=0",
        "run.save_rollouts_every=0",
    ]
    run(1, *supervised)
    history = records(Path("runs/one"))
    assert history[-1]["student/nll"] < 0.3 * history[1]["student/nll"]
    assert not any(name.startswith(("policy/", "distill/")) for name in history[-1])


QUICK = ["train.steps=3", "eval.prompts=[]", "eval.every=0", "run.save_every=0", "run.export=false"]


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        (["objective.support=rollout_topk"], {"policy/topk_mismatch", "distill/overlap_ratio"}),
        (
            ["objective={support: teacher_topk, normalize: vocab, tail: true}"],
            {"distill/reverse_kl"},
        ),
        (
            ["objective={support: teacher_topk, divergence: forward_kl}", "teacher.payload=topk"],
            {"student/entropy"},
        ),
        (
            ["objective={support: sampled, form: policy_gradient}", "teacher.payload=sampled"],
            {"student/entropy"},
        ),
        (["base={path: student}", "objective.extrapolation=1.25"], {"distill/reverse_kl"}),
        (
            [
                "objective={support: full, aggregation: seq-mean-token-mean}",
                "objective.weights={student_entropy_top: {fraction: 0.5}}",
                "metrics.position_bucket=6",
                "rollout.correction=icepop",
            ],
            {"distill/reverse_kl@0", "distill/reverse_kl@6", "policy/corrected_fraction@6"},
        ),
    ],
)
def test_every_way_to_judge_runs_from_a_config(home, words, measured):
    run(2, "parallel.tp=2", *words, *QUICK)
    for record in records(Path("runs/one")):
        assert {"loss/objective", "policy/mismatch_kl", *measured} <= record.keys()
        assert record.get("policy/topk_mismatch", 0) < 0.01  # on-policy, and in float32
        assert 0 < record["optim/grad_norm"] < 1000


@pytest.mark.parametrize("how", ["{extrapolation: 0.0}", "{extrapolation: 0.0, support: sampled}"])
def test_the_base_is_what_is_extrapolated_from(home, how):
    """λ = 0 leaves the base alone: a student that is its base has nothing to learn."""
    run(1, f"objective={how}", "objective.form=policy_gradient", "base.path=student", *QUICK)
    first = records(Path("runs/one"))[0]
    assert abs(first["loss/objective"]) < 1e-6 and first["optim/grad_norm"] < 1e-5
    assert first["distill/reverse_kl"] > 0.1  # to the teacher


# the loop without what stands beside it
ALONE = ("eval.prompts=[]", "eval.every=0", "run.tensorboard=false")


def texts(folder, step):
    lines = (folder / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_one_round_of_rollouts_serves_several_updates(home):
    words = ["run.save_rollouts_every=1", "run.save_every=0", "eval.every=0"]
    run(1, *words)
    fresh = [texts(Path("runs/one"), step) for step in (1, 2, 3, 4, 5)]
    run(1, *words, "train.updates_per_rollout=3", "run.dir=runs/two")
    again = [texts(Path("runs/two"), step) for step in (1, 2, 3, 4, 5)]
    stale = [r["rollout/staleness_steps"] for r in records(Path("runs/two"))[1:]]
    assert stale == [0, 1, 2, 0, 1]
    for one, other in zip(fresh, again, strict=True):
        assert [r["prompt"] for r in one] == [r["prompt"] for r in other]
    responses = [[[row["response"] for row in step] for step in run] for run in (fresh, again)]
    assert responses[1][0] == responses[0][0] and responses[1][1] != responses[0][1]


def test_a_round_survives_a_checkpoint_in_its_middle(home):
    assert_resumes_exactly("train.updates_per_rollout=3", *ALONE)


def test_a_mix_of_the_datasets_responses_and_drawn_ones(home):
    words = ["objective.support=full", "objective.divergence=jsd", "rollout.data_fraction=0.5"]
    whole = assert_resumes_exactly(*words, "run.save_rollouts_every=1", *ALONE)
    rows = [row for step in (1, 2, 3, 4) for row in texts(Path("runs/one"), step)]
    given, drawn = ([r for r in rows if r["drawn"] == kind] for kind in (False, True))
    assert given and drawn
    assert all(r["response"].removesuffix("<|im_end|>") == r["answer"] for r in given)
    assert 0 < sum(r.get("rollout/data_fraction", 0) for r in whole) < 4


def test_replicas_of_a_mix_have_unlike_numbers_of_responses(home):
    """The dataset answers a prompt once, the engine eight times: one replica has written fewer."""
    words = ["objective.support=full", "rollout.data_fraction=0.5", "rollout.n=8"]
    run(2, *words, "train.prompts_per_step=2", "train.microbatch_tokens=80", *ALONE)
    history = records(Path("runs/one"))
    assert len(history) == 5 and max(r["train/microbatches"] for r in history) > 2
    for record in history:
        room = 2 * record["train/microbatches"] * 80
        assert record["train/fill"] == pytest.approx(record["train/packed_tokens"] / room)
        assert 0.8 < record["train/balance"] <= 1 and 0.5 < record["train/fill"] <= 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rollout.engine=replay", "rollout.n=1"], "rollout.data_fraction: got 0.5, expected 0"),
        (["objective.support=sampled", "objective.form=policy_gradient"], "objective.support: got"),
        (["objective.support=rollout_topk"], "objective.support: got 'rollout_topk'"),
    ],
)
def test_what_a_mix_does_not_go_with(home, words, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        check(load_config(["config.yaml"], [*words, "rollout.data_fraction=0.5"]), 1)


def test_metrics_are_taken_at_the_first_step_every_so_often_and_at_the_last(home):
    words = ["train.steps=5", "metrics={every: 3, token_fraction: 0.5}", "rollout.correction=mask"]
    run(1, *QUICK, *words)
    history = records(Path("runs/one"))
    assert ["distill/reverse_kl" in record for record in history] == [1, 0, 1, 0, 1]
    assert all("loss/objective" in record for record in history)
    assert all(record["policy/corrected_fraction"] == 0 for record in history)  # float32


def test_masked_responses_are_written_and_not_supervised(home):
    words = ["rollout.mask_truncated=true", "rollout.mask_format='[0-9]'", "rollout.max_tokens=4"]
    run(1, *QUICK, *words, "run.save_rollouts_every=1")
    for record in records(Path("runs/one")):
        path = Path(f"runs/one/rollouts/step_{record['step']:06d}.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        wanted = [r["finish"] == "length" or not re.search("[0-9]", r["response"]) for r in rows]
        assert [row["masked"] for row in rows] == wanted
        assert record["rollout/masked_fraction"] == pytest.approx(sum(wanted) / 8)
        assert sum(wanted) > 0


def test_a_step_with_nothing_to_learn_from_goes_by(home):
    run(1, *QUICK, "rollout.mask_format=never written", "run.save_every=1")
    for record in records(Path("runs/one")):
        assert record["rollout/masked_fraction"] == 1 and record["optim/grad_norm"] == 0
        assert "loss/objective" not in record and "distill/reverse_kl" not in record
    text = Path("runs/one/log.txt").read_text()
    assert text.count("no token of this step is supervised") == 3
    run(
        1,
        *QUICK,
        "train.steps=4",
        "rollout.mask_format=null",
        "run.save_every=1",
        "run.resume=true",
    )
    assert records(Path("runs/one"))[-1]["loss/objective"] > 0


def test_the_student_comes_nearer_to_its_teacher(home):
    run(
        1,
        "train.steps=60",
        "eval.every=0",
        "run.save_every=0",
        "run.save_rollouts_every=0",
    )
    history = records(Path("runs/one"))
    assert history[-1]["distill/reverse_kl"] < 0.8 * history[1]["distill/reverse_kl"]


def test_the_console_skips_steps_but_the_records_do_not(home):
    words = ["train.steps=5", "eval.prompts=[]", "eval.every=0", "run.save_every=0"]
    run(1, *words, "run.print_every=2", "run.export=false")
    said = re.findall(r"step (\d)/5 │", Path("runs/one/log.txt").read_text())
    assert said == ["2", "4", "5"]
    assert [record["step"] for record in records(Path("runs/one"))] == [1, 2, 3, 4, 5]


def test_warnings_are_said_and_kept(home):
    (home / "teacher/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    words = ["train.steps=3", "eval.prompts=[]", "eval.every=0", "eval.n=3", "rollout.top_k=9"]
    run(1, *words, "eval.temperature=1.0", "run.export=false")
    text = Path("runs/one/log.txt").read_text()
    assert "warning: teacher.path: it may end a response with [7], where the student goes" in text
    assert "warning: eval.n: has no effect in this config" in text
    assert "warning: rollout.top_p=1, rollout.top_k=9: responses come from a truncated" in text


def test_a_teacher_that_prefers_nothing_is_named(home):
    path = home / "teacher/model.safetensors"
    save_file({k: v if "norm" in k else v * 1e-3 for k, v in load_file(path).items()}, path)
    run(1, "train.steps=3", "eval.prompts=[]", "eval.every=0", "run.export=false")
    text = Path("runs/one/log.txt").read_text()
    assert "teacher: its entropy is 5.56 nats of at most 5.56" in text


def _supervision(rank, layout):
    """Take two steps of the job; return what was supervised beside what was sampled."""
    words = [f"parallel.tp={layout[0]}", f"parallel.pp={layout[1]}", "run.dir=runs/real"]
    config = load_config(["real.yaml"], words)
    parallel = mesh.initialize(*layout)
    job = Job(config, parallel)
    job.restore()
    seen = []
    for step in (1, 2):
        rollouts = job.generate(step, Clock())
        batches = job.pack(rollouts, step)
        judgements = job.score(batches)
        metrics = train_step(job.student, batches, judgements, job.objective)
        record = metrics.reduce(None, parallel.device)
        written = Counter(
            pair for r in rollouts for pair in zip(r.response_ids, r.logp, strict=True)
        )
        trained = Counter(
            pair
            for b in batches
            for pair in zip(b.target_N.tolist(), b.rollout_logp_N.tolist(), strict=True)
        )
        judged = [
            len(one.teacher.hidden_NH) == len(batch.target_N)
            for one, batch in zip(judgements, batches, strict=True)
            if one.teacher
        ]
        seen.append((written == trained, all(judged), sum(written.values()), record))
    return seen


@pytest.mark.skipif(not DAPO.is_file(), reason=f"needs {DAPO.name} in ../shared/data")
@pytest.mark.parametrize("layout", [(2, 1), (2, 2)], ids=["TP2", "TP2×PP2"])
def test_real_prompts(tmp_path, monkeypatch, layout):
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    rows = pyarrow.parquet.read_table(DAPO, columns=["prompt"]).slice(0, 3000).to_pylist()
    make_home(tmp_path, [row["prompt"][0]["content"] for row in rows], vocab_size=2000)
    text = CONFIG.replace(
        "prompts: [prompts.jsonl], max", f"prompts: [{DAPO}], too_long: drop, max"
    )
    text = text.replace("max_prompt_tokens: 64", "max_prompt_tokens: 512")
    text = text.replace("max_tokens: 12", "max_tokens: 24").replace("tokens: 128", "tokens: 1024")
    (tmp_path / "real.yaml").write_text(text)
    for rank in run_ranks(_supervision, layout[0] * layout[1], layout):
        for once, judged, tokens, record in rank:
            assert once and judged and tokens > 100
            assert record["policy/mismatch_max"] < 1e-4
            assert record["distill/reverse_kl"] > 0
