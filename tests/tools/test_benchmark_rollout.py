"""The benchmark of the engines, end to end on the real vLLM, and what the user got wrong."""

import json

import pytest

from tests.rollout.needs_vllm import NEEDS_VLLM
from tools import benchmark_rollout as benchmark

TINY = ["--prompts", "3", "--prompt-tokens", "4", "--max-tokens", "5", "--repeats", "2"]
MODEL = ["--layers", "1", "--hidden", "64", "--ffn", "64", "--heads", "1", "--vocab", "96"]


@NEEDS_VLLM
def test_everything_is_measured_and_vllm_alone_does_the_same_work(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert benchmark.main([*TINY, *MODEL, "--syncs", "6", "--json", str(path)]) == 0
    rows = {row["measured"]: row for row in json.loads(path.read_text())}
    for ids in ("", ", 16 ids"):
        alone, located, embedded = (rows[f"generation, {who}{ids}"] for who in benchmark.OTHER)
        for row, other in ((located, alone), (embedded, located)):
            pairs = zip(row["repeats"], other["repeats"], strict=True)
            low, high = sorted(a / b for a, b in pairs)
            assert low <= row["ratio"] <= high
            assert row["rate"] * row["value"] == pytest.approx(3 * 5)
    copy, sync = (rows[f"{what} of 0 MiB"] for what in ("copy", "sync"))
    layer = 4 * 64 * 64 + 3 * 64 * 64 + 2 * 64 + 2 * 64  # attention, mlp, norms of q, k and both
    count = pytest.approx(4e-9 * (96 * 64 + layer + 64))
    assert copy["rate"] * copy["value"] == count == sync["rate"] * sync["value"]
    assert len(rows["growth, sync 5 to 6"]["repeats"]) == 6
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("|")]
    assert len(shown) == 2 + len(rows) and len({len(line) for line in shown}) == 1


def test_what_the_user_got_wrong_is_one_line(tmp_path, capsys):
    for arguments, told in (
        (["--layers", "0"], "--layers: got 0, expected 1 or more"),
        (["--prompt-tokens", "0"], "--prompt-tokens: got 0, expected 1 or more"),
        (["--syncs", "5"], "--syncs: got 5, expected 6 or more"),
        (["--vocab", "8"], "--top-ids: got 16, expected at most --vocab 8"),
    ):
        assert benchmark.main([*TINY, "--json", str(tmp_path / "x"), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {told}"
    assert not list(tmp_path.iterdir())
