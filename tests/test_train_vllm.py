"""The loop with vLLM as its engine, as users run it; what preflight says of vLLM's options."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_opd import parallel as mesh
from megatron_opd.config_file import load_config
from megatron_opd.job import Job
from megatron_opd.preflight import check
from tests.distributed import run_ranks
from tests.rollout.needs_vllm import NEEDS_VLLM
from tests.test_train import assert_resumes_exactly, make_home, records, run

VLLM = "rollout.engine=vllm"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Two models whose attention heads vLLM has on a CPU."""
    monkeypatch.chdir(tmp_path)
    return make_home(tmp_path, head_dim=32)


def written(step):
    """Read the rollouts that rank 0's replica wrote."""
    text = Path(f"runs/one/rollouts/step_{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@NEEDS_VLLM
@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, ["parallel.tp=2", "objective.support=rollout_topk"]),
        (2, ["parallel.tp=2", "rollout.tp=2", "rollout.logprobs=3", "rollout.correction=tis"]),
        (2, ["parallel.pp=2", "rollout.temperature=0.8"]),
        (2, ["objective={support: sampled, form: policy_gradient}", "rollout.correction=mask"]),
    ],
)
def test_a_run_trains_on_what_vllm_wrote(home, world, words):
    run(world, VLLM, "train.steps=3", "run.save_rollouts_every=3", *words)
    history = records(Path("runs/one"))
    assert [r["step"] for r in history] == [0, 1, 2, 3]
    for record in history[1:]:
        assert record["policy/mismatch_max"] < 1e-4  # weights are the student's at every step
        assert record["optim/grad_norm"] > 0
        if "rollout_topk" in words[-1]:
            assert record["policy/topk_mismatch"] == 0
        if "correction" in words[-1]:
            assert record["policy/corrected_fraction"] == 0
    rows = written(3)
    kept = 3 if "rollout.logprobs=3" in words else 8 if "rollout_topk" in words[-1] else 0
    for row in rows:
        assert len(row.get("top_ids", [[]])[0]) == len(row.get("top_logp", [[]])[0]) == kept


@NEEDS_VLLM
def test_a_resumed_run_draws_and_learns_what_the_uninterrupted_one_does(home):
    assert_resumes_exactly(VLLM)


@NEEDS_VLLM
def test_every_response_is_of_one_prompt_of_the_step_and_replicas_share_them(home):
    run(2, VLLM, "train.steps=3", "run.save_rollouts_every=1", "eval.at_start=false")
    for step in (1, 2, 3):
        rows = written(step)
        assert set(Counter(row["prompt"] for row in rows).values()) == {2}  # rollout.n
        assert len(rows) == 4  # of rank 0's replica: half of 4 prompts


def refusal(home, *words, world=1):
    with pytest.raises(ValueError) as caught:
        check(load_config(["config.yaml"], [VLLM, *words]), world)
    return str(caught.value)


@NEEDS_VLLM
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["vllm.max_num_batched_token=64"],
            "vllm.max_num_batched_token: vLLM's EngineArgs have no such field; did you mean "
            "'max_num_batched_tokens'?",
        ),
        (["vllm.max_num_seqs=4"], "vllm.max_num_seqs: is set by rollout.batch_size; set that"),
        (
            ["vllm.load_format=auto"],
            "vllm.load_format: is what the engine depends on and cannot be set",
        ),
        (
            ["objective.support=rollout_topk", "rollout.top_p=0.9"],
            "rollout: got top_p=0.9 and top_k=0, but the 8 most likely ids are to come with every",
        ),
        (
            ["objective.support=rollout_topk", "rollout.logprobs=5"],
            "rollout.logprobs: got 5, expected objective.k=8, the size of the support",
        ),
        (
            ["parallel.tp=2", "rollout.tp=3"],
            "rollout.tp: got 3, expected a divisor of parallel.tp=2",
        ),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_is_loaded(home, words, line):
    assert line in refusal(home, *words, world=2)


@NEEDS_VLLM
def test_networks_that_vllm_does_not_have_are_refused(home):
    path = home / "student/config.json"
    network = json.loads(path.read_text())
    path.write_text(json.dumps(network | {"head_dim": 24}))
    assert "head_dim=24, but vLLM on a CPU has attention heads of 32, 64" in refusal(home)
    del network["architectures"]
    path.write_text(json.dumps(network))
    assert "names no 'architectures', by which vLLM finds the network" in refusal(home)


def _told(rank):
    """What vLLM was built with, as it says itself."""
    words = [VLLM, "parallel.tp=2", "rollout={tp: 2, batch_size: 7, max_tokens: 20}"]
    config = load_config(["config.yaml"], [*words, "eval.max_tokens=30", "vllm.block_size=64"])
    engine = Job(config, mesh.initialize(2)).engine
    told = engine.llm.llm_engine.vllm_config
    return engine.engines, [
        told.parallel_config.tensor_parallel_size,
        told.scheduler_config.max_num_seqs,
        told.model_config.max_model_len,
        told.cache_config.block_size,
    ]


@NEEDS_VLLM
def test_what_vllm_is_told(home):
    assert run_ranks(_told, 2) == [(1, [2, 7, 64 + 30, 64])] * 2


@NEEDS_VLLM
def test_values_that_vllm_refuses_are_one_line(home):
    with pytest.raises(
        RuntimeError, match=r"ValueError: vllm: No common block size for 7"
    ) as caught:
        run(1, VLLM, "vllm.block_size=7")
    assert "rank 0" in str(caught.value)


def test_without_vllm_the_line_says_what_to_install(home):
    config = load_config(["config.yaml"], [VLLM])
    if NEEDS_VLLM.args[0]:  # the condition of the skip: vLLM is absent
        with pytest.raises(ValueError, match=r"rollout.engine: .* `make vllm` installs it"):
            check(config, 1)
    else:
        check(config, 1)


def test_options_of_an_engine_that_is_not_used_are_named(home):
    warnings = check(load_config(["config.yaml"], ["vllm.block_size=16"]), 1)
    assert "vllm: has no effect in this config" in warnings
