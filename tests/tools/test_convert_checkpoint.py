"""The converter: Hugging Face → Megatron → Hugging Face is the same bits, at any two layouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_opd import checkpoint
from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.model import build_model, export_hf, load_hf
from megatron_opd.model.torch_dist import (
    fork_checkpoint_writer,
    sharded_weights,
    write_companions,
)
from megatron_opd.step import make_student
from tests.distributed import run_ranks
from tests.hf import read_json, write_checkpoint
from tools.convert_checkpoint import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="hides GPUs only as a program")


def convert(kind, source, target, tp=1, pp=1) -> int:
    return main([kind, str(source), str(target), "--tp", str(tp), "--pp", str(pp)])


@pytest.mark.parametrize(
    ("dtype", "there", "back"),
    [
        (torch.float32, (2, 2), (1, 1)),
        (torch.bfloat16, (1, 2), (2, 1)),
        (torch.float16, (2, 1), (2, 2)),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_tied", "qwen3"])
def test_round_trip_is_bit_exact(tmp_path, family, dtype, there, back):
    folder = write_checkpoint(tmp_path / "hf", family, dtype=dtype)
    original = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in original.values()} == {dtype}
    assert convert("hf-to-megatron", folder, tmp_path / "megatron", *there) == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", *back) == 0
    final = load_file(tmp_path / "back" / "model.safetensors")
    assert final.keys() == original.keys()
    for name, tensor in original.items():
        assert final[name].dtype == dtype and torch.equal(final[name], tensor), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert read_json(tmp_path / "back" / name) == read_json(folder / name)
    assert not list(tmp_path.glob("tmp_*"))


def test_the_layout_may_change_the_padded_vocabulary(tmp_path):
    """203 rows pad to 256 at tp 1 and 2, and 4 heads of 4 groups let tp 4 pad to 512."""
    folder = write_checkpoint(tmp_path / "hf", "qwen3", num_key_value_heads=4)
    assert convert("hf-to-megatron", folder, tmp_path / "megatron", tp=4) == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", pp=2) == 0
    original = load_file(folder / "model.safetensors")
    final = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(final[name], tensor) for name, tensor in original.items())


def _save_as_a_run_does(rank, source, folder, dtype):
    parallel = mesh.initialize(2)
    model = build_model(source, parallel, dtype=dtype, seed=None)
    load_hf(model, source, parallel)
    student = make_student(model, parallel, cfg.Optimizer(), steps=3, vocab_size=203)
    student.optimizer.step()  # it has no state before the first
    weights = sharded_weights(model)
    optimizer = student.optimizer.sharded_state_dict(weights, metadata=checkpoint.METADATA)
    fork_checkpoint_writer()
    parallel.owner(lambda: folder.mkdir(parents=True))
    dist_checkpointing.save({"model": weights, "optimizer": optimizer}, str(folder))
    parallel.owner(lambda: write_companions(source, folder, dtype, stop_ids=(7, 3)))
    return {name: tensor.clone() for name, tensor in export_hf(model, parallel)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_checkpoint_of_a_run_becomes_its_weights(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "hf", "qwen3", dtype=dtype)
    folder = tmp_path / "checkpoints" / "step_000050"
    saved, _ = run_ranks(_save_as_a_run_does, 2, source, folder, dtype)
    assert convert("megatron-to-hf", folder, tmp_path / "back", pp=2) == 0
    final = load_file(tmp_path / "back" / "model.safetensors")
    assert final.keys() == saved.keys()
    for name, tensor in saved.items():
        assert final[name].dtype == dtype and torch.equal(final[name], tensor), name
    assert read_json(tmp_path / "back" / "tokenizer.json") == read_json(source / "tokenizer.json")
    stops = read_json(tmp_path / "back" / "generation_config.json")["eos_token_id"]
    assert {3, 7} <= set(stops) and stops == sorted(stops)


def test_errors_are_one_line_and_leave_nothing_behind(tmp_path, capfd):
    folder = write_checkpoint(tmp_path / "hf", "qwen3")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    broken = write_checkpoint(tmp_path / "broken", "qwen3")
    save_file(tensors, broken / "model.safetensors")
    mixed = write_checkpoint(tmp_path / "mixed", "qwen3")
    tensors["model.norm.weight"] = torch.ones(32).half()
    save_file(tensors, mixed / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    new = tmp_path / "new"
    for kind, source, target, layout, told in [
        ("hf-to-megatron", folder, mixed, {}, f"DST={mixed} exists"),
        ("hf-to-megatron", tmp_path, new, {}, "expected a Hugging Face config.json"),
        ("hf-to-megatron", folder, new, {"tp": 3}, "tp=3 does not divide"),
        ("hf-to-megatron", mixed, new, {}, "dtype F16, F32, expected"),
        ("hf-to-megatron", broken, new, {"pp": 2}, "model.norm.weight has values that are not"),
        ("megatron-to-hf", folder, new, {}, "has no metadata.json, expected a Megatron checkpoint"),
    ]:
        capfd.readouterr()
        assert convert(kind, source, target, **layout) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and told in error
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} == set()


def test_it_runs_as_a_program(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "hf-to-megatron" in capsys.readouterr().out
    folder = write_checkpoint(tmp_path / "hf", "qwen2_tied", dtype=torch.bfloat16)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tools" / "convert_checkpoint.py"), "hf-to-megatron"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    subprocess.run([*command, folder, tmp_path / "megatron"], check=True, env=environment)
    assert (tmp_path / "megatron" / "hf" / "tokenizer.json").exists()
