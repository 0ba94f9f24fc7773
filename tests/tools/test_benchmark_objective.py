"""The benchmark measures what it says: errors against the definitions, and the peak of memory."""

import json
import math

import pytest
import torch

from megatron_opd import parallel as mesh
from tests.distributed import run_ranks
from tools import benchmark_objective as benchmark

TINY = ["--tokens", "48", "--vocab", "512", "--hidden", "16", "--k", "4", "--repeats", "2"]


def run(path, *arguments: str) -> dict:
    assert benchmark.main([*TINY, "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("tp", ["1", "2"])
def test_every_row_has_the_gradient_of_its_definition(tmp_path, capsys, tp):
    result = run(tmp_path / "out.json", "--tp", tp)
    assert [row["row"] for row in result["rows"]] == ["baseline", *benchmark.ROWS]
    assert result["absent"] == {} and result["options"]["tp"] == int(tp)
    for row in result["rows"]:
        assert max(row["hidden_error"], row["head_error"]) < 1e-4, row
        assert len(row["repeats"]) == 2 and min(row["repeats"]) <= row["seconds"]
        assert math.isfinite(row["time_ratio"]) and row["time_ratio"] > 0
        assert row["time_target"] == benchmark.ALL[row["row"]].time
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(result["rows"]) and len({len(line) for line in lines}) == 1


def test_peers_are_measured_or_said_to_be_absent(tmp_path, capsys):
    result = run(tmp_path / "out.json", "--rows", "full", "--dtype", "bfloat16", "--peers")
    rows = {row["row"]: row for row in result["rows"]}
    assert rows.keys() | result["absent"].keys() == {"baseline", "full", *benchmark.PEERS}
    assert max(rows["full"]["hidden_error"], rows["full"]["head_error"]) < 0.05
    shown = capsys.readouterr().out.splitlines()
    for name, why in result["absent"].items():
        assert f"{name}: absent, {why}" in shown


def _measure_what_is_known(rank):
    options = benchmark.arguments([*TINY, "--json", "unused"])
    inputs = benchmark.make_inputs(options, mesh.initialize())

    def allocate(i):
        return i.hidden_TH.sum() * torch.ones(2**24).sum()  # 64 MiB

    full = benchmark.make_step(benchmark.ROWS["full"], inputs)
    wrong = benchmark.errors(benchmark.ROWS["full_forward_kl"], full, inputs)
    return wrong, benchmark.mebibytes(allocate, inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of the process")
def test_a_wrong_gradient_and_a_known_allocation_are_seen():
    ((wrong, mebibytes),) = run_ranks(_measure_what_is_known, 1)
    assert min(wrong) > 0.01
    assert 60 < mebibytes < 70


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
