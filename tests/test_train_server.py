"""The loop with a real vLLM server: it writes, one step ahead too, and it judges."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from megatron_opd.config_file import load_config
from megatron_opd.preflight import preflight
from tests.rollout.needs_vllm import NEEDS_VLLM
from tests.test_train import assert_resumes_exactly, make_home, records, run
from tests.vllm_server import serve

pytestmark = NEEDS_VLLM
IDS = 259  # of the tokenizer


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A home, a server of its student, one of its teacher."""
    home = make_home(
        tmp_path_factory.mktemp("home"), head_dim=32, spare_rows=0
    )  # of a teacher they count
    served = serve(home / "student", IDS), serve(home / "teacher", IDS, student=False)
    yield home, *served
    for server in served:
        server.stop()


@pytest.fixture
def home(servers, tmp_path, monkeypatch):
    shutil.copytree(servers[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def writes(servers, *more):
    servers[1].wait()
    return ["rollout.engine=vllm_server", f"rollout.url={servers[1].url}", "train.steps=4", *more]


def test_a_server_writes_what_the_co_located_engine_writes(servers, home):
    """Same seeds, same weights at every step: the same run."""
    run(2, *writes(servers, "parallel.tp=2", "run.dir=runs/server"))
    run(2, "rollout.engine=vllm", "train.steps=4", "parallel.tp=2", "run.dir=runs/beside")
    one, other = (records(Path(f"runs/{name}")) for name in ("server", "beside"))
    assert [r["rollout/response_tokens"] for r in one[1:]] == [
        r["rollout/response_tokens"] for r in other[1:]
    ]
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine["loss/objective"] == pytest.approx(theirs["loss/objective"], rel=1e-4)
        assert mine["policy/mismatch_max"] < 1e-4 and mine["rollout/staleness_steps"] == 0


@pytest.mark.parametrize("layout", [[], ["parallel.tp=2"]], ids=["dp2", "tp2"])
def test_one_step_ahead_is_off_policy_by_one_and_resumes_exactly(servers, home, layout):
    whole = assert_resumes_exactly(*writes(servers, "rollout.async_depth=1", *layout))
    assert [r["rollout/staleness_steps"] for r in whole[1:]] == [0, 1, 1, 1]
    assert whole[1]["policy/mismatch_max"] < 1e-4 < whole[3]["policy/mismatch_max"]


def test_a_server_judges_as_the_teacher_on_our_ranks(servers, home):
    servers[2].wait()
    for payload, support in (
        ("topk", "{support: teacher_topk, k: 8}"),
        ("sampled", "{support: sampled, form: policy_gradient, k: 8}"),
    ):
        words = [f"teacher.payload={payload}", f"objective={support}", "train.steps=3"]
        run(2, *words, "parallel.pp=2", f"run.dir=runs/{payload}_ours")
        served = ["teacher.kind=server", f"teacher.url={servers[2].url}"]
        run(2, *words, *served, "parallel.pp=2", f"run.dir=runs/{payload}_server")
        ours, theirs = (records(Path(f"runs/{payload}_{who}")) for who in ("ours", "server"))
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            assert one["loss/objective"] == pytest.approx(other["loss/objective"], rel=1e-3)
            assert one["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=1e-3)


def test_what_a_server_cannot_do_is_found_before_anything_is_loaded(servers, home):
    def refusal(*words):
        with pytest.raises(ValueError) as caught:
            preflight(load_config(["config.yaml"], list(words)), 1)
        return str(caught.value)

    gone = "rollout.url=http://127.0.0.1:1"
    assert "nobody answers there" in refusal(
        "rollout.engine=vllm_server", gone, "rollout.retries=0"
    )
    long = ["rollout.max_tokens=100", "train.microbatch_tokens=1000"]
    assert "--max-model-len" in refusal(*writes(servers, *long))
    line = refusal("rollout.engine=vllm_server", f"rollout.url={servers[2].url}")
    assert "got --weight-transfer-config" in line  # the teacher's server takes no weights
    told = preflight(
        load_config(["config.yaml"], ["rollout.engine=vllm_server", gone]), 1, dry_run=True
    )
    assert any("nobody answers there" in warning for warning in told.warnings)


def test_a_server_that_is_killed_stops_the_run_and_the_checkpoint_goes_on(home):
    server = serve(home / "student", IDS)
    server.wait()
    words = ["rollout.engine=vllm_server", f"rollout.url={server.url}", "rollout.retries=1"]
    words += ["train.steps=4", "run.save_rollouts_every=1"]

    def kill():
        while not Path("runs/one/checkpoints/step_000002/state.json").exists():
            time.sleep(0.01)
        server.kill()

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    with pytest.raises(
        RuntimeError, match=r"ValueError: http://127.0.0.1:\d+/\S+: .*asked \d times"
    ):
        run(2, *words)
    watcher.join()
    other = serve(home / "student", IDS)
    other.wait()
    again = [word.replace(server.url, other.url) for word in words]
    run(2, *again, "run.resume=true")
    run(2, *again, "run.dir=runs/whole")
    other.stop()
    assert records(Path("runs/one")) == records(Path("runs/whole"))
    prompts = []
    for step in range(1, 5):  # no prompt is lost, none is trained on twice
        text = Path(f"runs/one/rollouts/step_{step:06d}.jsonl").read_text()
        assert text == Path(f"runs/whole/rollouts/step_{step:06d}.jsonl").read_text()
        prompts += [json.loads(line)["prompt"] for line in text.splitlines()]
    assert len(prompts) == 4 * 4 and len(set(prompts)) >= 6
