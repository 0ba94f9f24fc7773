"""The doctor as a program: its table, its JSON, its exit codes, and one line for bad input."""

import contextlib
import io
import json
import os

import pytest

from megatron_opd import parallel as mesh
from megatron_opd.config_file import load_config
from megatron_opd.doctor.material import Material
from tests.distributed import run_ranks
from tests.home import make_home
from tools import doctor


def _main(rank: int, words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = doctor.main(words)
    return code, out.getvalue(), err.getvalue()


def run(*words: str, world: int = 1) -> list[tuple[int, str, str]]:
    return run_ranks(_main, world, list(words))


def test_the_table_and_the_json_say_the_same(tmp_path, monkeypatch):
    """Of weights that are zeros; the run may have begun, and nothing of it is touched."""
    home = make_home(tmp_path)
    monkeypatch.chdir(home)
    (home / "runs/one").mkdir(parents=True)
    (home / "runs/one/log.txt").write_text("begun")
    words = ("config.yaml", "parallel.tp=2", "--prompts", "8", "--json", "rows.json")
    (code, out, _), (_, silent, _) = run(*words, world=2)
    rows = json.loads((home / "rows.json").read_text())
    assert code == 1 and silent == "" and os.listdir(home / "runs/one") == ["log.txt"]
    assert all(list(row) == ["check", "verdict", "value", "advice"] for row in rows)
    assert {row["verdict"] for row in rows} == {"ok", "warn", "fail"}
    told = [line for line in out.splitlines() if not line.startswith(" ")]
    for row, line in zip(rows, told, strict=True):
        assert line.startswith(row["check"]) and line[20:24].strip() == row["verdict"]
    assert [row["check"] for row in rows if row["verdict"] == "fail"] == [
        "student loads",
        "verdict",
    ]
    assert "\033" not in out  # no terminal, no colors


def _remedy(rank: int) -> str:
    config = load_config(["config.yaml"], [])
    return Material(config, mesh.initialize(), prompts=4, words="config.yaml").remedy


def test_the_cold_start_that_is_advised_is_a_config(tmp_path, monkeypatch):
    """The overrides of the command make a config of supervised training out of the user's."""
    monkeypatch.chdir(make_home(tmp_path))
    (remedy,) = run_ranks(_remedy, 1)
    generate, train = remedy.split("; ")
    assert generate == (
        "python tools/generate.py teacher prompts.jsonl --max-prompt-tokens 64 --max-tokens 36 "
        "--dtype float32 --reject truncated --out cold_start.jsonl"
    )
    words = train.split()[3:]
    assert words[0] == "config.yaml"
    config = load_config(words[:1], words[1:])
    assert config.teacher is None and config.objective.divergence == "cross_entropy"
    assert config.rollout.engine == "replay" and config.run.dir == "runs/one_cold_start"


BAD = {
    "teacher: missing": [
        "teacher=null",
        "objective.divergence=cross_entropy",
        "objective.support=sampled",
    ],
    "--teacher: got 'math', expected none: there is a single teacher": ["--teacher", "math"],
    "--json: no directory 'nowhere'": ["--json", "nowhere/rows.json"],
    "optimizer.lrr: no such key; did you mean optimizer.lr?": ["optimizer.lrr=1"],
    "teacher.path: no directory 'absent'": ["teacher.path=absent"],
    "data.prompts: no file 'absent.jsonl'": ["data.prompts=[absent.jsonl]"],
}


@pytest.mark.parametrize("told", BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, told):
    monkeypatch.chdir(make_home(tmp_path))
    assert doctor.main(["config.yaml", *BAD[told]]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {told}") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_prompts_must_be_positive(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["config.yaml", "--prompts", "0"])
    assert stop.value.code == 2 and "--prompts: got 0" in capsys.readouterr().err
