"""Checkpoints: whole or absent, pruned, and a resumed run equal bit by bit to an unbroken one."""

import pytest
import torch

from megatron_opd import checkpoint
from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf
from megatron_opd.packing import pack
from megatron_opd.step import Judgement, make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from tests.distributed import run_ranks
from tests.tiny import VOCAB, make_rollouts, qwen3

ADAMW = cfg.Optimizer(lr=1e-2, warmup_steps=2, schedule="cosine", weight_decay=0.1)
OBJECTIVE = Objective("student_topk", k=8)


def _student(parallel, *, seed, dtype=torch.float32, optimizer=ADAMW):
    model = build_model(qwen3(), parallel, dtype=dtype, seed=seed)
    return make_student(model, parallel, optimizer, steps=8, vocab_size=VOCAB)


def _teacher(parallel, dtype):
    frozen = build_model(qwen3(), parallel, dtype=dtype, seed=2, trainable=False)
    return MegatronTeacher(frozen, parallel, vocab_size=VOCAB)


def _run(student, teacher, steps):
    parallel = student.parallel
    history = []
    for step in steps:
        rollouts = make_rollouts([(3, 5), (4, 9), (2, 3), (6, 6)], seed=step)
        batches = pack(rollouts[parallel.dp_rank :: parallel.dp], microbatch_tokens=30)
        judgements = [Judgement(scores) for scores in teacher.score(batches)]
        metrics = train_step(student, batches, judgements, OBJECTIVE)
        history.append(metrics.reduce(None, parallel.device))
    return history


def _weights(student):
    return {name: tensor.clone() for name, tensor in export_hf(student.model, student.parallel)}


def _unbroken(rank, layout, folder, dtype, optimizer):
    parallel = mesh.initialize(*layout)
    student = _student(parallel, seed=1, dtype=dtype, optimizer=optimizer)
    teacher = _teacher(parallel, dtype)
    _run(student, teacher, range(3))
    checkpoint.save(folder, student, {"step": 3, "stream": {"cursor": 12}}, keep=1, source=qwen3())
    return _run(student, teacher, range(3, 6)), _weights(student)


def _resumed(rank, layout, folder, dtype, optimizer):
    parallel = mesh.initialize(*layout)
    student = _student(parallel, seed=99, dtype=dtype, optimizer=optimizer)  # other weights
    state = checkpoint.load(checkpoint.latest(folder, parallel), student)
    history = _run(student, _teacher(parallel, dtype), range(state["step"], 6))
    return state, history, _weights(student)


LAYOUTS = {"one": (1, (1, 1)), "TP2": (2, (2, 1)), "PP2": (2, (1, 2)), "DP2": (2, (1, 1))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world,layout", LAYOUTS.values(), ids=LAYOUTS)
def test_resume_is_bit_equal(tmp_path, world, layout, dtype):
    expected = run_ranks(_unbroken, world, layout, tmp_path, dtype, ADAMW)
    got = run_ranks(_resumed, world, layout, tmp_path, dtype, ADAMW)
    for (history, weights), (state, resumed, restored) in zip(expected, got, strict=True):
        assert state == {"step": 3, "stream": {"cursor": 12}}
        assert resumed == history
        assert all(torch.equal(weights[name], restored[name]) for name in weights)


def test_resume_without_the_distributed_optimizer(tmp_path):
    plain = ADAMW.model_copy(update={"distributed": False})
    ((history, weights),) = run_ranks(_unbroken, 1, (1, 1), tmp_path, torch.float32, plain)
    ((_, resumed, restored),) = run_ranks(_resumed, 1, (1, 1), tmp_path, torch.float32, plain)
    assert resumed == history
    assert all(torch.equal(weights[name], restored[name]) for name in weights)


def _prune(rank, folder):
    parallel = mesh.initialize()
    student = _student(parallel, seed=1)
    (folder / "tmp_step_000001").mkdir()  # what a killed run left half written
    assert checkpoint.latest(folder, parallel) is None
    _run(student, _teacher(parallel, torch.float32), range(1))
    for step in (1, 2, 3, 3):
        checkpoint.save(folder, student, {"step": step}, keep=2, source=qwen3())
    return sorted(path.name for path in folder.iterdir()), checkpoint.latest(folder, parallel).name


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path):
    assert run_ranks(_prune, 1, tmp_path) == [(["step_000002", "step_000003"], "step_000003")]
