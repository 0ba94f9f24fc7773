import json
import logging
import math
import sys
import time

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_opd.metrics import Metrics, RunLog, check_mirrors, console_line
from tests.distributed import run_ranks

CPU = torch.device("cpu")


def _measure(rank):
    """Ranks 0 and 1 hold nothing, as early pipeline stages; 2 and 3 hold different tokens."""
    metrics = Metrics()
    metrics.set("optim/lr", 0.5)
    if rank >= 2:
        means = {
            "student/nll": (torch.tensor(1.0), torch.tensor(10 ** (rank - 1))),
            "distill/overlap_ratio": (torch.tensor(float(rank)), torch.tensor(1)),
            "unmeasured": (torch.tensor(0.0), torch.tensor(0)),
        }
        metrics.add(means, {"policy/mismatch_max": torch.tensor(-float(rank))})
        metrics.add(means, {"policy/mismatch_max": -9.0})
    if rank == 3:
        metrics.mean("rollout/response_tokens", 30, 4)
        metrics.mean("never", 0.0, 0)
    return metrics.reduce(dist.group.WORLD, CPU)


def test_reduction_is_a_global_mean_and_ranks_may_hold_nothing():
    for merged in run_ranks(_measure, 4):
        assert merged == {
            "student/nll": pytest.approx(4 / 220, rel=1e-12),  # not the mean of 1/10 and 1/100
            "distill/overlap_ratio": 2.5,  # each mean has its own count
            "rollout/response_tokens": 7.5,
            "policy/mismatch_max": -2.0,
            "optim/lr": 0.5,
        }


def _subgroup(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    metrics = Metrics()
    metrics.mean("a", rank, 1)
    return metrics.reduce(groups[rank // 2], CPU), Metrics().reduce(groups[rank // 2], CPU)


def test_reduction_stays_in_its_group_and_may_be_empty():
    values = run_ranks(_subgroup, 4)
    assert [merged["a"] for merged, _ in values] == [0.5, 0.5, 2.5, 2.5]
    assert all(empty == {} for _, empty in values)


def _small_addends(rank):
    metrics = Metrics()
    for _ in range(1000):
        metrics.mean("a", torch.tensor(0.1), 1)
    metrics.mean("a", torch.tensor(2.0**26), 0)  # in fp32 its neighbours are 8 apart
    return metrics.reduce(dist.group.WORLD, CPU)["a"]


def test_sums_are_float64():
    assert run_ranks(_small_addends, 2) == [pytest.approx((2**26 + 100) / 1000, rel=1e-9)] * 2


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    def write(folder, steps, resume_step):
        run = RunLog(folder, {}, resume_step=resume_step)
        for step in steps:
            run.log(step, {"loss/objective": 1 / step})
        run.close()

    write(tmp_path / "whole", range(1, 8), None)
    broken = tmp_path / "broken"
    write(broken, range(1, 6), None)
    with (broken / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "loss/obj')  # killed while writing
    write(broken, range(4, 8), 3)  # from the checkpoint of step 3
    assert records(broken) == records(tmp_path / "whole")
    assert records(broken)[0] == {"step": 1, "loss/objective": 1.0}


def test_a_record_is_on_disk_at_once_and_the_log_keeps_what_is_said(tmp_path):
    run = RunLog(tmp_path / "run", {})
    run.log(0, {"eval/accuracy": 0.25})
    assert records(tmp_path / "run") == [{"step": 0, "eval/accuracy": 0.25}]
    logging.getLogger("megatron_opd.data").warning("3 prompts dropped")
    run.close()
    logging.getLogger("megatron_opd.data").warning("after the end")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.endswith(" 3 prompts dropped\n") and "after" not in text


def test_tensorboard_has_the_same_numbers_and_forgets_what_resuming_forgets(tmp_path):
    for steps, resume_step in ((range(1, 6), 0), (range(4, 7), 3)):
        run = RunLog(tmp_path, {}, tensorboard=True, resume_step=resume_step)
        for step in steps:
            run.log(step, {"loss/objective": step + resume_step})
        run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("loss/objective")]
    assert scalars == [(1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (6, 9)]


def test_wandb_offline_writes_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resume_step in (0, 1):
        run = RunLog(tmp_path, {"seed": 3}, wandb="opd", resume_step=resume_step)
        run.log(1, {"loss/objective": 0.125})
        run.close()
    identity = (tmp_path / "wandb_id.txt").read_text()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and all(identity in file.name for file in files)  # one W&B run, resumed
    deadline = time.monotonic() + 10  # W&B's own process writes the last bytes after `finish`
    while not all(b"loss/objective" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "module", "line"),
    [
        ({"tensorboard": False, "wandb": "opd"}, "wandb", "run.wandb: .* pip install wandb"),
        ({"tensorboard": True, "wandb": None}, "tensorboard", "pip install tensorboard"),
    ],
)
def test_a_missing_mirror_is_one_line(monkeypatch, options, module, line):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "path", [])  # nothing can be found
    with pytest.raises(ValueError, match=line):
        check_mirrors(**options)


def test_wandb_without_a_login_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match=r"run.wandb: no login; run `wandb login`"):
        check_mirrors(tensorboard=False, wandb="opd")


def test_wandb_is_not_imported_unless_asked(tmp_path):
    monkey = sys.modules.pop("wandb", None)
    try:
        RunLog(tmp_path, {}).close()
        assert "wandb" not in sys.modules
    finally:
        if monkey is not None:
            sys.modules["wandb"] = monkey


def test_console_line_shows_what_is_there():
    metrics = {
        "loss/objective": 0.2134,
        "distill/reverse_kl": 0.198,
        "distill/overlap_ratio": 0.83,
        "student/entropy": 0.61,
        "teacher/entropy": 0.55,
        "policy/mismatch_kl": 3e-4,
        "rollout/response_tokens": 812.4,
        "rollout/truncated_fraction": 0.03,
        "optim/grad_norm": 0.42,
        "perf/tokens_per_s": 11800.0,
        "time/rollout_s": 12.4,
        "time/score_s": 4.0,
        "time/train_s": 6.1,
        "time/sync_s": 0.6,
        "time/step_s": 23.1,
    }
    assert console_line(12, 200, metrics) == (
        "step 12/200 │ loss 0.2134 │ rkl 0.198 │ overlap 0.83 │ ent 0.61/0.55 │ mis 3e-04 │ "
        "len 812 (3% cut) │ gnorm 0.42 │ 11.8k tok/s │ "
        "23.1s = roll 12.4 + teach 4.0 + train 6.1 + sync 0.6 │ eta 1h12m"
    )
    assert console_line(0, 5, {"eval/accuracy": 0.25}) == "step 0/5 │ acc 0.250"
    slow = console_line(4, 5, {"time/step_s": 75.0, "loss/objective": math.nan})
    assert slow == "step 4/5 │ loss nan │ 75.0s │ eta 1m15s"
    fast = console_line(3, 5, {"time/step_s": 0.5, "time/train_s": 0.04})
    assert fast == "step 3/5 │ 0.50s = train 0.04 │ eta 1s"
