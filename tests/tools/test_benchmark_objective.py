"""The benchmark measures what it says: errors against the definitions, and the peak of memory."""

import json

import pytest
import torch

from megatron_opd import parallel as mesh
from tests.distributed import run_ranks
from tools import benchmark_objective as benchmark

TINY = ["--tokens", "48", "--vocab", "512", "--hidden", "16", "--k", "4", "--repeats", "2"]


def run(path, *arguments: str) -> dict[str, dict]:
    assert benchmark.main([*TINY, "--json", str(path), *arguments]) == 0
    return {row["loss"]: row for row in json.loads(path.read_text())}


@pytest.mark.parametrize("tp", ["1", "2"])
def test_every_row_has_the_gradient_of_its_definition(tmp_path, capsys, tp):
    rows = run(tmp_path / "out.json", "--tp", tp)
    assert list(rows) == ["baseline", *benchmark.ROWS]
    for row in rows.values():
        assert max(row["grad_error"], row["grad_error_norm"]) < 1e-4, row
        assert len(row["repeats"]) == 2 and min(row["repeats"]) <= row["seconds"]
        assert row["baseline_seconds"] == rows["baseline"]["seconds"] > 0
        assert row["baseline_peak_bytes"] == rows["baseline"]["peak_bytes"] > 0
        assert (row["tokens"], row["vocab"], row["hidden"], row["k"]) == (48, 512, 16, 4)
        assert (row["tp"], row["dtype"]) == (int(tp), "float32")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows) and len({len(line) for line in lines}) == 1


def test_peers_are_measured_or_said_to_be_absent(tmp_path, capsys):
    rows = run(tmp_path / "out.json", "--rows", "full", "--dtype", "bfloat16", "--peers")
    shown = capsys.readouterr().out.splitlines()
    absent = {line.split(":")[0] for line in shown if ": absent, " in line}
    assert rows.keys() | absent == {"baseline", "full", *benchmark.PEERS}
    assert rows["full"]["grad_error"] < 0.05


def _measure_what_is_known(rank):
    options = benchmark.arguments([*TINY, "--json", "unused"])
    inputs = benchmark.make_inputs(options, mesh.initialize())

    def allocate(i):
        return i.hidden_TH.sum() * torch.ones(2**24).sum()  # 64 MiB

    full = benchmark.make_step(benchmark.ROWS["full"], inputs)
    wrong = benchmark.errors(benchmark.ROWS["full_forward_kl"], full, inputs)
    return wrong, benchmark.peak_bytes(allocate, inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of the process")
def test_a_wrong_gradient_and_a_known_allocation_are_seen():
    ((wrong, peak),) = run_ranks(_measure_what_is_known, 1)
    assert min(wrong.values()) > 0.01
    assert 60 < peak / 2**20 < 70


def test_what_the_user_got_wrong_is_one_line(tmp_path, capsys):
    for arguments, told in (
        (["--rows", "full,fool"], "--rows: got 'fool', expected names of full, "),
        (["--tp", "3"], "--vocab: got 512, expected a multiple of --tp 3"),
        (["--k", "0"], "--k: got 0, expected 1 or more"),
    ):
        assert benchmark.main([*TINY, "--json", str(tmp_path / "x"), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {told}")
    assert not list(tmp_path.iterdir())
