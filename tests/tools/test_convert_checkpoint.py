"""The converter: there and back is the same bits, and a kill or a full disk loses nothing."""

import filecmp
import os
import resource
import shutil
import signal
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
from megatron_opd.model.parts import Draft
from megatron_opd.model.torch_dist import (
    fork_checkpoint_writer,
    sharded_weights,
    write_companions,
)
from megatron_opd.step import make_student
from tests.distributed import run_ranks
from tests.hf import FAMILIES, read_json, write_checkpoint
from tools import convert_checkpoint
from tools.convert_checkpoint import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="hides GPUs only as a program")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def convert(kind, source, target, *options) -> int:
    return main([kind, str(source), str(target), *options])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same_files(one: Path, other: Path) -> bool:
    names = {file.relative_to(one) for file in one.rglob("*") if file.is_file()}
    theirs = {file.relative_to(other) for file in other.rglob("*") if file.is_file()}
    return names == theirs and filecmp.cmpfiles(one, other, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_exact(tmp_path, family):
    dtype = DTYPES[list(FAMILIES).index(family) % 3]
    folder = write_checkpoint(tmp_path / "hf", family, dtype=dtype)
    assert convert("hf-to-megatron", folder, tmp_path / "megatron", "--verify") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--verify") == 0
    original, final = tensors(folder), tensors(tmp_path / "back")
    assert final.keys() == original.keys()
    for name, tensor in original.items():
        assert final[name].dtype == tensor.dtype and torch.equal(final[name], tensor), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert read_json(tmp_path / "back" / name) == read_json(folder / name)
    assert not list(tmp_path.glob("tmp_*"))


def test_dtype_is_that_of_the_weights_and_of_the_config(tmp_path):
    """The bias that corrects the choice of experts stays fp32, as both sides keep it."""
    folder = write_checkpoint(tmp_path / "hf", "deepseek_v3")
    there, back = tmp_path / "megatron", tmp_path / "back"
    assert convert("hf-to-megatron", folder, there, "--dtype", "bfloat16", "--verify") == 0
    assert convert("megatron-to-hf", there, back, "--dtype", "float32", "--verify") == 0
    assert read_json(there / "hf" / "config.json")["dtype"] == "bfloat16"
    assert read_json(back / "config.json")["dtype"] == "float32"
    original, corrections = tensors(folder), 0
    for name, tensor in tensors(back).items():
        kept = name.endswith("e_score_correction_bias")
        corrections += kept
        expected = original[name] if kept else original[name].bfloat16().float()
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), name
    assert corrections == 3


@pytest.mark.parametrize("kind", ["hf-to-megatron", "megatron-to-hf"])
def test_any_number_of_workers_writes_the_same_files(tmp_path, monkeypatch, kind):
    source = _source(tmp_path, monkeypatch, kind)
    for workers in "1", "3":
        assert convert(kind, source, tmp_path / workers, "--workers", workers, "--verify") == 0
    assert same_files(tmp_path / "1", tmp_path / "3")
    assert len(list((tmp_path / "1").iterdir())) > 10


def _source(tmp_path, monkeypatch, kind) -> Path:
    """Return a checkpoint to convert, into parts of a few tensors."""
    source = write_checkpoint(tmp_path / "hf", "qwen2_moe", shard_size="50KB")
    if kind == "megatron-to-hf":
        assert convert("hf-to-megatron", source, tmp_path / "megatron") == 0
        source = tmp_path / "megatron"
    monkeypatch.setattr(convert_checkpoint, "PART_BYTES", dict.fromkeys(PART_BYTES, 20_000))
    return source


PART_BYTES = convert_checkpoint.PART_BYTES


def _in_child(function) -> int:
    """Run `function` in a forked process and return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(function())
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


def _killed(kind, source, target) -> int:
    """Convert, and be killed when the fifth file is on the disk."""
    left, sync = [5], os.fsync

    def last(file):
        sync(file)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = last
    return convert(kind, source, target)


@pytest.mark.parametrize("kind", ["hf-to-megatron", "megatron-to-hf"])
def test_after_a_kill_it_goes_on(tmp_path, monkeypatch, kind, capfd):
    source, target = _source(tmp_path, monkeypatch, kind), tmp_path / "out"
    assert convert(kind, source, tmp_path / "at_once") == 0
    assert os.WTERMSIG(_in_child(lambda: _killed(kind, source, target))) == signal.SIGKILL
    draft, pattern = tmp_path / "tmp_out", "[_m]*.*"  # parts, or shards
    finished = {file: file.stat() for file in draft.glob(pattern)}
    assert len(finished) >= 4 and not target.exists()

    assert convert(kind, source, target, "--dtype", "float32") == 2
    assert "was begun with dtype='None', got 'torch.float32'; go on" in capfd.readouterr().err
    assert convert(kind, source, target) == 0
    assert same_files(target, tmp_path / "at_once") and not draft.exists()
    again = [
        f
        for f, stat in finished.items()
        if (target / f.name).stat().st_mtime_ns != stat.st_mtime_ns
    ]
    assert len(again) <= 1  # the one it was killed in


def _on_a_full_disk(kind, source, target) -> int:
    """No file may be longer than 25 kB: as a full disk, it is an OSError of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000))
    return convert(kind, source, target)


@pytest.mark.parametrize("kind", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, kind, capfd):
    source, target = _source(tmp_path, monkeypatch, kind), tmp_path / "out"
    monkeypatch.setattr(convert_checkpoint, "PART_BYTES", dict.fromkeys(PART_BYTES, 27_000))
    capfd.readouterr()
    assert os.WEXITSTATUS(_in_child(lambda: _on_a_full_disk(kind, source, target))) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "tmp_out: the same command goes on" in line
    assert convert(kind, source, target, "--verify") == 0


def test_one_program_at_a_time_writes_a_draft(tmp_path):
    kept = [Draft(tmp_path / "out", {"dtype": "keep"})]
    with pytest.raises(ValueError, match="tmp_out: another program is writing it"):
        Draft(tmp_path / "out", {"dtype": "keep"})
    kept.clear()
    Draft(tmp_path / "out", {"dtype": "keep"}).drop()
    (tmp_path / "tmp_out").mkdir()
    with pytest.raises(ValueError, match="tmp_out exists and is no unfinished conversion; remove"):
        Draft(tmp_path / "out", {"dtype": "keep"})


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
    assert convert("megatron-to-hf", folder, tmp_path / "back") == 0
    final = tensors(tmp_path / "back")
    assert final.keys() == saved.keys()
    for name, tensor in saved.items():
        assert final[name].dtype == dtype and torch.equal(final[name], tensor), name
    assert read_json(tmp_path / "back" / "tokenizer.json") == read_json(source / "tokenizer.json")
    stops = read_json(tmp_path / "back" / "generation_config.json")["eos_token_id"]
    assert {3, 7} <= set(stops) and stops == sorted(stops)


def test_verify_names_the_tensor_that_differs(tmp_path, capfd):
    folder = write_checkpoint(tmp_path / "hf", "qwen3")
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    changed = tensors(tmp_path / "back")
    changed["model.layers.2.self_attn.k_proj.weight"][5, 5] += 1e-7
    changed["model.norm.weight"][0] += 1e-7
    save_file(changed, tmp_path / "back" / "model.safetensors")
    capfd.readouterr()
    for workers in "1", "2":
        options = ("--verify", "--workers", workers)
        assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", *options) == 1
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert "back: model.layers.2.self_attn.k_proj.weight is not that of" in line
    assert convert("hf-to-megatron", folder, tmp_path / "megatron", "--verify") == 0


def test_errors_are_one_line_and_leave_nothing_behind(tmp_path, capfd):
    folder = write_checkpoint(tmp_path / "hf", "qwen3", shard_size="50KB")
    shard = sorted(folder.glob("model-*"))[1].name

    def changed(name: str, change) -> Path:
        shutil.copytree(folder, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def edit(change):
        def apply(copy: Path) -> None:
            file = next(f for f in copy.glob("model-*") if "model.norm.weight" in load_file(f))
            content = load_file(file)
            change(content)
            save_file(content, file, metadata={"format": "pt"})

        return apply

    infinite = changed("infinite", edit(lambda x: x["model.norm.weight"].__setitem__(0, torch.inf)))
    zero = changed("zero", edit(lambda x: x["model.norm.weight"].zero_()))
    mixed = changed(
        "mixed",
        edit(lambda x: [x.update({k: x[k].half()}) for k in list(x) if "layers.3.input" in k]),
    )
    absent = changed("absent", lambda copy: (copy / shard).unlink())
    cut = changed("cut", lambda copy: os.truncate(copy / shard, 5000))
    megatron = tmp_path / "megatron"
    assert convert("hf-to-megatron", folder, megatron) == 0
    before, new = sorted(tmp_path.iterdir()), tmp_path / "new"
    (other := tmp_path / "other").mkdir()
    shutil.copytree(megatron, zarr := tmp_path / "other" / "zarr")
    (zarr / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    for kind, source, target, options, told in [
        ("hf-to-megatron", folder, mixed, [], f"DST={mixed} exists"),
        ("hf-to-megatron", folder, new, ["--workers", "0"], "--workers=0, expected at least 1"),
        ("hf-to-megatron", other, new, [], "expected a Hugging Face config.json"),
        ("hf-to-megatron", infinite, new, [], "model.norm.weight has values that are not finite"),
        ("hf-to-megatron", infinite, new, ["--workers", "2"], "model.norm.weight has values that"),
        ("hf-to-megatron", zero, new, [], "model.norm.weight is all zero"),
        ("hf-to-megatron", absent, new, [], f"names files that are missing: {shard}"),
        ("hf-to-megatron", cut, new, [], f"{shard}: not a readable safetensors file"),
        ("hf-to-megatron", mixed, new, [], "layer_norm_weight have dtypes float16, float32, but"),
        ("megatron-to-hf", folder, new, [], "has no metadata.json, expected a Megatron checkpoint"),
        ("megatron-to-hf", zarr, new, [], "sharded_backend='zarr', expected 'torch_dist'"),
        ("megatron-to-hf", megatron, new, ["--hf", str(other)], "expected a Hugging Face config"),
    ]:
        capfd.readouterr()
        assert convert(kind, source, target, *options) == 2, told
        (error,) = capfd.readouterr().err.strip().splitlines()
        assert error.startswith("error: ") and told in error
    shutil.rmtree(other)
    assert sorted(tmp_path.iterdir()) == before


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
