"""Optimizer and gradients away between updates: their memory goes, and no number changes."""

import pytest
import torch

from megatron_opd import checkpoint
from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf
from megatron_opd.offload import Offloaded
from megatron_opd.packing import pack
from megatron_opd.step import Judgement, make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from tests.distributed import run_ranks
from tests.tiny import VOCAB, make_rollouts, qwen3

ADAMW = cfg.Optimizer(lr=1e-2, weight_decay=0.1, eps=1e-3)
OBJECTIVE = Objective("student_topk", k=8)


def _student(parallel, dtype, optimizer, seed=1):
    model = build_model(qwen3(), parallel, dtype=dtype, seed=seed)
    return make_student(model, parallel, optimizer, steps=8, vocab_size=VOCAB)


def _train(student, teacher, steps):
    parallel = student.parallel
    for step in steps:
        rollouts = make_rollouts([(3, 5), (4, 9), (2, 3), (6, 6)], seed=step)
        batches = pack(rollouts[parallel.dp_rank :: parallel.dp], microbatch_tokens=30)
        judgements = [Judgement(scores) for scores in teacher.score(batches)]
        train_step(student, batches, judgements, OBJECTIVE)
    return {name: tensor.clone() for name, tensor in export_hf(student.model, parallel)}


def _held(student):
    """Return the bytes that only an update needs, per parameter."""
    parameters = list(student.model.parameters())
    tensors = [buffer.grad_data for chunk in student.ddp for buffer in chunk.buffers]
    for part in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        tensors += [p for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [x for state in part.optimizer.state.values() for x in state.values()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    for parameter in parameters:  # of float32, the optimizer works on the weights themselves
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(s.nbytes() for s in storages.values()) / sum(p.numel() for p in parameters)


def _run(rank, layout, dtype, optimizer, folder):
    """Train, save, train on; and go on from the checkpoint with nothing offloaded."""
    parallel = mesh.initialize(*layout)
    frozen = build_model(qwen3(), parallel, dtype=dtype, seed=2, trainable=False)
    teacher = MegatronTeacher(frozen, parallel, vocab_size=VOCAB, offload=optimizer.offload)
    student = _student(parallel, dtype, optimizer)
    held = [_held(student)]
    _train(student, teacher, range(2))
    held.append(_held(student))
    checkpoint.save(folder, student, {"step": 2}, keep=1, source=qwen3())
    held.append(_held(student))
    unbroken = _train(student, teacher, range(2, 4))
    other = _student(parallel, dtype, optimizer, seed=9)
    checkpoint.load(folder / "step_000002", other)
    held.append(_held(other))
    return held, unbroken, _train(other, teacher, range(2, 4))


CASES = {
    "fp32 DP2": ((1, 1), 2, torch.float32, True),
    "bf16 TP2": ((2, 1), 2, torch.bfloat16, True),
    "bf16 plain": ((1, 1), 1, torch.bfloat16, False),
    "fp32 plain": ((1, 1), 1, torch.float32, False),
}


@pytest.mark.parametrize(("layout", "world", "dtype", "distributed"), CASES.values(), ids=CASES)
def test_an_offloaded_optimizer_holds_nothing_and_changes_nothing(
    tmp_path, layout, world, dtype, distributed
):
    here = ADAMW.model_copy(update={"distributed": distributed})
    away = here.model_copy(update={"offload": True})
    expected = run_ranks(_run, world, layout, dtype, here, tmp_path / "here")
    got = run_ranks(_run, world, layout, dtype, away, tmp_path / "away")
    for (plain, unbroken, resumed), (held, *both) in zip(expected, got, strict=True):
        states = 8 if dtype == torch.float32 else 12
        shards = world // layout[0] if distributed else 1
        assert plain[1:] == [pytest.approx(4 + states / shards, rel=0.05)] * 3
        assert held == [0.0] * 4
        for weights in (resumed, *both):
            assert all(torch.equal(unbroken[name], tensor) for name, tensor in weights.items())


def test_a_tensor_that_is_away_keeps_what_it_was_given_before():
    tensor = torch.arange(6.0).reshape(2, 3)
    away = Offloaded([tensor])
    assert tensor.untyped_storage().nbytes() == tensor.numel() == 0
    for _ in range(2):
        away.fetch()
        assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3))
        tensor.zero_()  # of the device's copy alone
        away.release()
