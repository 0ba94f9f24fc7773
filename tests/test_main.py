import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_opd.__main__ import _is_for_the_user, main
from megatron_opd.config import sections
from megatron_opd.config_file import load_config
from megatron_opd.metrics import console_line
from tests.home import make_home

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "megatron_opd"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_home(tmp_path)


def environment(**ranks):
    return {**os.environ, "PYTHONPATH": str(ROOT), **ranks}


def run(*words, cwd, command=PROGRAM, **ranks):
    return subprocess.run(
        [*command, *words],
        cwd=cwd,
        env=environment(**ranks),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_has_every_key_and_comes_at_once(tmp_path):
    began = time.perf_counter()
    answer = run("--help", cwd=tmp_path)
    assert time.perf_counter() - began < 3  # 0.15 s alone; a torch import takes longer
    assert answer.returncode == 0 and answer.stderr == ""
    for name, kind in sections().items():
        for key, field in kind.model_fields.items():
            if key not in sections():
                path = f"{name}.{key}".lstrip(".")
                entry = rf"^  {re.escape(path)} +\S[^;]*; (required|default .+)$"
                assert re.search(entry, answer.stdout, re.M)
                assert str(field.description) in answer.stdout
    assert (
        "  teacher.dtype                      bfloat16 | float32 | null; default null"
        in answer.stdout
    )
    assert "  data.prompts                       list; required" in answer.stdout
    kinds = "token-mean | seq-mean-token-sum | seq-mean-token-mean |\n"  # goes on below
    kinds += " " * 37 + "seq-mean-token-sum-norm; default token-mean\n"
    assert f"  objective.aggregation              {kinds}" in answer.stdout
    assert max(map(len, answer.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no config file; usage: python -m megatron_opd CONFIG.yaml"),
        (["absent.yaml"], "config: no file 'absent.yaml'"),
        (["config.yaml", "optimizer.lrr=1"], "optimizer.lrr: no such key; did you mean"),
        (["optimizer.lr=0", "config.yaml", "--dry-run"], "optimizer.lr: got 0, expected greater"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(home, words, line):
    before = sorted(home.rglob("*"))
    answer = run(*words, cwd=home)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith(f"error: {line}") and answer.stderr.count("\n") == 1
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("words", [["--bogus"], ["--ranks", "2"], ["--dry-run", "--ranks", "0"]])
def test_options_that_are_refused(tmp_path, words):
    answer = run("config.yaml", *words, cwd=tmp_path)
    assert answer.returncode == 2 and "usage: python -m megatron_opd" in answer.stderr
    assert answer.stdout == ""


def test_dry_run_plans_for_any_number_of_ranks(home, capsys):
    before = sorted(home.rglob("*"))
    assert main(["config.yaml", "--dry-run", "parallel.tp=2", "--ranks", "4"]) == 0
    assert "4 = tp 2 × pp 1 × dp 2" in capsys.readouterr().out
    assert main(["config.yaml", "--dry-run", "parallel.tp=2"]) == 2  # a world of one
    assert "needs a multiple of 2 ranks, got 1" in capsys.readouterr().err
    assert sorted(home.rglob("*")) == before


def test_a_rank_leaves_the_error_to_rank_0_for_a_while(home):
    waiting = subprocess.Popen(
        [*PROGRAM, "absent.yaml"],
        cwd=home,
        env=environment(RANK="1", WORLD_SIZE="2"),
        stderr=subprocess.PIPE,
        text=True,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=3)
    waiting.kill()
    assert waiting.communicate()[1] == ""


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.n=0", "error: rollout.n: got 0, expected greater than or equal to 1"),
        ("parallel.tp=4", "error: parallel: tp=4 × pp=1 needs a multiple of 4 ranks, got 2"),
    ],
)
def test_torchrun_ranks_print_one_error_between_them(home, override, line):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    torchrun += ["megatron_opd"]
    before = sorted(home.rglob("*"))
    began = time.perf_counter()
    answer = run("config.yaml", override, cwd=home, command=torchrun)
    assert time.perf_counter() - began < 60
    assert answer.returncode != 0
    assert answer.stderr.count("error: ") == 1 and line in answer.stderr
    assert "exitcode  : 2" in answer.stderr and "megatron_opd/" not in answer.stderr
    assert sorted(home.rglob("*")) == before


def test_only_what_we_raise_loses_its_traceback(tmp_path):
    with pytest.raises(ValueError) as ours:
        load_config([tmp_path / "absent.yaml"])
    with pytest.raises(ValueError) as bug:
        console_line(1, 2, {"loss/objective": "text"})  # type: ignore[dict-item]
    assert _is_for_the_user(ours.value) and not _is_for_the_user(bug.value)
