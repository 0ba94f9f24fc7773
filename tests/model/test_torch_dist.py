"""Megatron's own format: another layout loads it, another model is refused in one line."""

import argparse
import functools
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.model import architecture, build_model, export_hf, load_hf
from megatron_opd.model.convert import ToMegatron
from megatron_opd.model.dist_files import MegatronFiles
from megatron_opd.model.hf_map import manifest
from megatron_opd.model.parts import JOURNAL
from megatron_opd.model.stored import places
from megatron_opd.model.torch_dist import (
    fork_checkpoint_writer,
    load_megatron,
    save_megatron,
    sharded_weights,
)
from megatron_opd.step import make_student
from tests.distributed import run_ranks
from tests.hf import FAMILIES, hf_model, read_json, write_checkpoint
from tools.convert_checkpoint import main

LAYOUTS = {  # of 4 ranks
    "tp2·sp·pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp2·vpp2·ep2": {"pp": 2, "vpp": 2, "ep": 2},
}


# q, k and v with a bias and with norms; tied; experts in all layers and in some; shared ones; MLA
SOME = ("qwen2_tied", "qwen3", "mixtral", "qwen2_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints as `transformers` writes them."""
    folder = tmp_path_factory.mktemp("hf")
    return {name: write_checkpoint(folder / name, name) for name in SOME}


def _build(folder, parallel, **how):
    return build_model(folder, parallel, dtype=torch.float32, seed=None, **how)


def _keys(model) -> dict:
    """Return what a model says that it stores: key → shape of the whole tensor."""
    state = sharded_weights(model)
    apply_factories(state)
    return {tensor.key: tensor.global_shape for tensor in nested_values(state)}


def _said(rank, families):
    parallel, said = mesh.initialize(), {}
    for family in families:
        said[family] = _keys(_build(hf_model(family).config.to_dict(), parallel))
    return said


def test_a_model_of_every_family_stores_what_the_map_says():
    (said,) = run_ranks(_said, 1, FAMILIES)
    for family, keys in said.items():
        arch = architecture(hf_model(family).config.to_dict())
        assert keys == {place.key: shape for _, place, shape in places(arch)}, family


def _saved(rank, checkpoints, axes):
    """Save a model of each family, and return what it says that it stores."""
    parallel, said = mesh.initialize(**axes), {}
    for family, folder in checkpoints.items():
        model = _build(folder, parallel)
        load_hf(model, folder, parallel)
        said[family] = _keys(model)
        save_megatron(model, folder, folder.parent / f"{family} {axes}", parallel)
    return said


def _same(files, folder):
    """Compare with the Hugging Face checkpoint it was made of, bit by bit."""
    expected = load_file(folder / "model.safetensors")
    shapes = manifest(architecture(folder))
    return shapes.keys() == expected.keys() and all(
        torch.equal(files.read(name, 0, 0, shape[0]), expected[name])
        for name, shape in shapes.items()
    )


@pytest.fixture(scope="module")
def saved(checkpoints):
    """Return layout → what its ranks said that they saved."""
    return {name: run_ranks(_saved, 4, checkpoints, axes) for name, axes in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_model_saves_lies_where_the_map_says(layout, checkpoints, saved):
    axes, ranks = LAYOUTS[layout], saved[layout]
    for family, folder in checkpoints.items():
        arch, said = architecture(folder), {}
        for rank in ranks:
            said |= rank[family]
        assert said == {place.key: shape for _, place, shape in places(arch)}, family
        files = MegatronFiles(folder.parent / f"{family} {axes}", arch)
        assert _same(files, folder), family


@pytest.fixture(scope="module")
def in_parts(checkpoints):
    """Return a converted checkpoint of many small files."""
    folder = checkpoints["qwen3"]
    written = folder.parent / "qwen3 in parts"
    (written / JOURNAL).mkdir(parents=True)
    job = ToMegatron(folder, written, None, part_bytes=1000)
    assert len(job.sizes) > 10
    for part in range(len(job.sizes)):
        list(job.do(part))
    job.finish()
    return written


@pytest.mark.usefixtures("saved")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_slice_is_that_of_the_tensor(checkpoints, in_parts, data):
    """Whether its chunks are cut by rank, or whole, and wherever heads of q, k and v lie."""
    folder = checkpoints["qwen3"]
    axes = LAYOUTS["tp2·sp·pp2"]
    written = data.draw(st.sampled_from([in_parts, folder.parent / f"qwen3 {axes}"]))
    files, expected = _opened(written, folder)
    name = data.draw(st.sampled_from(sorted(expected)))
    whole = torch.zeros(files.shape(name))  # a table is read with its padding
    whole[: len(expected[name])] = expected[name]
    dim = data.draw(st.integers(0, whole.dim() - 1))
    ends = st.integers(0, whole.size(dim))
    start, stop = sorted((data.draw(ends), data.draw(ends)))
    assert torch.equal(files.read(name, dim, start, stop), whole.narrow(dim, start, stop - start))


@functools.cache
def _opened(written, folder):
    return MegatronFiles(written, architecture(folder)), load_file(folder / "model.safetensors")


def test_a_slice_reads_just_its_bytes(checkpoints, in_parts):
    files, _ = _opened(in_parts, checkpoints["qwen3"])
    before = files.bytes_read
    files.read("model.layers.2.mlp.up_proj.weight", 0, 40, 48)
    assert files.bytes_read - before == 8 * 32 * 4


def _load(rank, checkpoints, written, axes, of_megatron):
    """Return which families are loaded as they were, by us or by Megatron's own loader."""
    parallel, found = mesh.initialize(**axes), {}
    for family in written:
        folder = checkpoints[family]
        model = _build(folder, parallel)
        if of_megatron:
            state: Any = dist_checkpointing.load(sharded_weights(model), str(written[family]))
            found[family] = not model.load_state_dict(state, strict=False).unexpected_keys
        else:
            load_megatron(model, written[family], parallel)
        expected = load_file(folder / "model.safetensors")
        found[family] = all(
            torch.equal(tensor, expected[name]) for name, tensor in export_hf(model, parallel)
        )
    return found


@pytest.mark.parametrize("of_megatron", [False, True], ids=["ours", "megatron"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_converter_writes_is_loaded_at_any_layout(layout, of_megatron, checkpoints):
    written = {}
    for family, folder in checkpoints.items():
        written[family] = folder.parent / f"{family} converted"
        if not written[family].exists():
            assert main(["hf-to-megatron", str(folder), str(written[family])]) == 0
    for found in run_ranks(_load, 4, checkpoints, written, LAYOUTS[layout], of_megatron):
        assert all(found.values()), found


def _save_as_megatron_lm(rank, source, top, metadata):
    """Write what Megatron-LM's training does: model, optimizer, generators, arguments."""
    parallel = mesh.initialize(2, 2, sequence_parallel=True)
    model = _build(source, parallel, padded_vocab=320)
    load_hf(model, source, parallel)
    (chunk,) = model.chunks
    student = make_student(model, parallel, cfg.Optimizer(), steps=3, vocab_size=203)
    student.optimizer.step()
    weights = chunk.sharded_state_dict(metadata=metadata)
    assert any(key.endswith("_extra_state") for key in weights)
    sharded = {key: value for key, value in weights.items() if not key.endswith("_extra_state")}
    dense = chunk.sharded_state_dict()
    state = {
        "model": weights if metadata else dense,
        "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], (4,), (rank,)),
        "args": argparse.Namespace(num_layers=4, tensor_model_parallel_size=2),
        "checkpoint_version": 3.0,
        "iteration": 100,
    }
    if not metadata:  # its optimizer state follows the weights' names
        named = {f"0.{key}": value for key, value in sharded.items()}
        how = {"distrib_optim_sharding_type": "fully_reshardable"}
        state["optimizer"] = student.optimizer.sharded_state_dict(named, metadata=how)
    folder = top / "iter_0000100"
    parallel.owner(lambda: folder.mkdir(parents=True))
    fork_checkpoint_writer()
    dist_checkpointing.save(state, str(folder))
    parallel.owner(lambda: (top / "latest_checkpointed_iteration.txt").write_text("100"))


@pytest.mark.parametrize(
    "metadata",
    [None, {"non_homogeneous_layers": True}, {"singleton_local_shards": True}],
    ids=["stacked", "by_layer", "by_layer_and_expert"],
)
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_a_checkpoint_of_megatron_lm_is_read(family, metadata, tmp_path, checkpoints, capsys):
    source, top = checkpoints[family], tmp_path / "lm"
    run_ranks(_save_as_megatron_lm, 4, source, top, metadata)
    keys = set(FileSystemReader(top / "iter_0000100").read_metadata().state_dict_metadata)
    experts = "experts.experts.1." if family == "mixtral" else ""
    own = {
        None: "decoder.layers.mlp.",
        "non_homogeneous_layers": "decoder.layers.1.mlp.",
        "singleton_local_shards": f"decoder.layers.1.mlp.{experts}linear_fc1.weight_v",
    }[next(iter(metadata or {}), None)]
    assert any(key.startswith(own) for key in keys), "the names that this test is about"
    command = ["megatron-to-hf", str(top), str(tmp_path / "back")]
    assert main(command) == 2 and "give --hf" in capsys.readouterr().err
    assert main([*command, "--hf", str(source), "--verify"]) == 0
    final, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "back", source))
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in expected.items())
    for found in run_ranks(_load, 4, checkpoints, {family: top}, LAYOUTS["pp2·vpp2·ep2"], False):
        assert all(found.values())


def _refused(rank, config, folder):
    parallel = mesh.initialize(1, 2)
    try:
        load_megatron(_build(config, parallel), folder, parallel)
    except ValueError as problem:
        return str(problem)
    return "loaded"


def test_another_model_does_not_load_it(tmp_path, checkpoints):
    folder = checkpoints["qwen2_tied"]
    assert main(["hf-to-megatron", str(folder), str(tmp_path / "saved")]) == 0
    config = read_json(folder / "config.json")
    for other, told in [
        (hf_model("qwen3", head_dim=8).config.to_dict(), "q_layernorm.weight is missing"),
        ({**config, "hidden_size": 64}, "has shape [256, 32], expected [203, 64]"),
        ({**config, "num_hidden_layers": 6}, "has shape [4, 32], expected [6, 32]"),
        ({**config, "model_type": "llama"}, "linear_qkv.bias: not in the model of config.json"),
    ]:
        for message in run_ranks(_refused, 2, other, tmp_path / "saved"):
            assert told in message and "\n" not in message
    for message in run_ranks(_refused, 2, config, tmp_path):
        assert "has no metadata.json" in message and "\n" not in message


def test_a_damaged_file_is_named(tmp_path, checkpoints):
    folder, saved = checkpoints["qwen3"], tmp_path / "saved"
    assert main(["hf-to-megatron", str(folder), str(saved)]) == 0
    arch, file = architecture(folder), saved / "__0_0.distcp"
    content = file.read_bytes()
    name, table = "model.embed_tokens.weight", load_file(folder / "model.safetensors")
    at = content.index(table[name][100].numpy().tobytes())

    flipped = bytearray(content)
    flipped[at] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"__0_0.distcp: embedding.*checksum is wrong"):
        MegatronFiles(saved, arch).read(name, 0, 0, 203)
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"__0_0.distcp: is cut off: it has .* bytes, expected"):
        MegatronFiles(saved, arch)
    file.unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp: is missing"):
        MegatronFiles(saved, arch)
    (saved / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"[.]metadata: not the metadata of a checkpoint"):
        MegatronFiles(saved, arch)


def _killed(write: int) -> None:
    """Start the writer's manager, tell its process id, and die as an out-of-memory rank does."""
    fork_checkpoint_writer()
    (manager,) = multiprocessing.active_children()
    os.write(write, str(manager.pid).encode())
    os.kill(os.getpid(), signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron's own manager is used with CUDA")
def test_the_checkpoint_writer_does_not_outlive_a_killed_rank():
    read, write = os.pipe()
    rank = os.fork()
    if rank == 0:
        try:
            _killed(write)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(rank, 0)[1]) == signal.SIGKILL
    os.close(write)
    manager, deadline = int(os.read(read, 20)), time.monotonic() + 1.0
    os.close(read)
    while runs(manager) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(manager)
