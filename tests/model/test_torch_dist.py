"""Megatron's own format: another layout loads it, another model is refused in one line."""

import multiprocessing
import os
import signal
import sys
import time

import psutil
import pytest
import torch

from megatron_opd.model import build_model, export_hf
from megatron_opd.model.torch_dist import fork_checkpoint_writer, load_megatron, save_megatron
from tests.distributed import run_ranks
from tests.hf import hf_model
from tests.model.layouts import join


def _save(rank, config, folder):
    parallel = join((2, 2, True))
    model = build_model(config, parallel, dtype=torch.float32, seed=1)
    save_megatron(model, config, folder, parallel)
    with pytest.raises(ValueError, match="exists; remove it"):
        save_megatron(model, config, folder, parallel)
    return {name: tensor.clone() for name, tensor in export_hf(model, parallel)}


def _load(rank, config, folder):
    parallel = join((1, 2, False))
    model = build_model(config, parallel, dtype=torch.float32, seed=2)
    try:
        load_megatron(model, folder, parallel)
    except ValueError as problem:
        return str(problem)
    return {name: tensor.clone() for name, tensor in export_hf(model, parallel)}


def test_another_layout_loads_it_and_another_model_does_not(tmp_path):
    config = hf_model("qwen2_tied").config.to_dict()
    saved, *_ = run_ranks(_save, 4, config, tmp_path / "saved")
    for loaded in run_ranks(_load, 2, config, tmp_path / "saved"):
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    for other, told in [
        (hf_model("qwen3", head_dim=8).config.to_dict(), "q_layernorm.weight is missing"),
        ({**config, "hidden_size": 64}, "has shape [4, 32], expected [4, 64]"),
        ({**config, "num_hidden_layers": 6}, "has shape [4, 32], expected [6, 32]"),
    ]:
        for message in run_ranks(_load, 2, other, tmp_path / "saved"):
            assert told in message and "\n" not in message
    for message in run_ranks(_load, 2, config, tmp_path):
        assert "not a Megatron checkpoint" in message and "\n" not in message


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
