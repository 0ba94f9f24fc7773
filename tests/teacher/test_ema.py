"""The teacher that is a running mean of the student: on shards, in fp32, through checkpoints."""

import pytest
import torch

from megatron_opd import checkpoint
from megatron_opd import parallel as mesh
from megatron_opd.judging import Judges
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf
from megatron_opd.packing import pack
from megatron_opd.step import make_student, train_step
from megatron_opd.teacher.ema import EmaTeacher
from tests.distributed import run_ranks
from tests.test_checkpoint import ADAMW
from tests.tiny import VOCAB, make_rollouts, qwen3

RATE = 0.3
OBJECTIVE = Objective("full", chunk_tokens=16)


def _pair(parallel, dtype=torch.float32, *, seed=1, tied=True, offload=False):
    """A student and its running mean, the only teacher."""
    hf = qwen3(tie_word_embeddings=tied)
    model = build_model(hf, parallel, dtype=dtype, seed=seed)
    student = make_student(model, parallel, ADAMW, steps=8, vocab_size=VOCAB)
    copy = build_model(hf, parallel, dtype=dtype, seed=None, trainable=False)
    how = dict(vocab_size=VOCAB, rate=RATE, offload=offload)
    return student, Judges({"": EmaTeacher(copy, model, parallel, **how)})


def _run(student, judges, steps):
    """Learn from what the mean says after another prompt; return the metrics of each step."""
    parallel, history = student.parallel, []
    for step in steps:
        rollouts = make_rollouts([(3, 5), (4, 9), (2, 3), (6, 6)], seed=step)
        batches = pack(rollouts[parallel.dp_rank :: parallel.dp], microbatch_tokens=30)
        metrics = train_step(student, batches, judges.score(batches), OBJECTIVE)
        distances = judges.follow()
        history.append(metrics.reduce(None, parallel.device) | distances)
    return history


def _weights(model, parallel):
    return {name: tensor.double() for name, tensor in export_hf(model, parallel)}


def _followed(rank, layout, offload=False):
    """Return the student's weights at every step, and the teacher's and the distances at last."""
    parallel = mesh.initialize(*layout)
    student, judges = _pair(parallel, offload=offload)
    students = [_weights(student.model, parallel)]
    distances = []
    for step in range(3):
        (record,) = _run(student, judges, [step])
        distances.append(record["teacher/ema_distance"])
        students.append(_weights(student.model, parallel))
    if offload:
        judges.teachers[""].away.fetch()
    return students, _weights(judges.teachers[""].model, parallel), distances


LAYOUTS = {"TP2": (2, (2, 1)), "DP2": (2, (1, 1)), "PP2": (2, (1, 2))}


@pytest.mark.parametrize(("world", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_mean_is_the_dense_one(world, layout):
    for students, teacher, distances in run_ranks(_followed, world, layout):
        mean = dict(students[0])
        for step, now in enumerate(students[1:]):
            mean = {name: (1 - RATE) * mean[name] + RATE * now[name] for name in now}
            apart = sum((mean[name] - now[name]).square().sum() for name in now)
            whole = sum(tensor.square().sum() for tensor in now.values())
            assert distances[step] == pytest.approx(float((apart / whole).sqrt()), rel=1e-4)
        assert max((mean[n] - teacher[n]).abs().max() for n in mean) < 1e-6
        moved = max((students[0][n] - teacher[n]).abs().max() for n in mean)
        assert moved > 1e-3 and distances[0] > 1e-4


def test_the_mean_rests_in_host_memory():
    """A CPU's host memory is its own; that weights go and come back shows all the same."""
    (plain,), (away,) = (run_ranks(_followed, 1, (1, 1), offload) for offload in (False, True))
    assert plain[2] == away[2]
    assert all(torch.equal(plain[1][name], away[1][name]) for name in plain[1])


def _slow(rank):
    """Follow a student that went one unit in the last place of bf16; return what moved."""
    parallel = mesh.initialize()
    student, judges = _pair(parallel, torch.bfloat16)
    teacher = judges.teachers[""]
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.view(torch.int16).add_(1)
    before = [master.clone() for master in teacher.masters]
    theirs, moved = [p.float() for p in student.model.parameters()], []
    for step in range(1, 5):
        teacher.follow()
        for master, start, target in zip(teacher.masters, before, theirs, strict=True):
            assert master.dtype == torch.float32
            expected = target + (start - target) * (1 - RATE) ** step
            assert torch.allclose(master, expected, rtol=1e-6, atol=1e-9)
        seen = list(teacher.model.parameters())
        for parameter, master in zip(seen, teacher.masters, strict=True):
            assert torch.equal(parameter, master.bfloat16())
        moved.append(any(not torch.equal(p, b) for p, b in zip(seen, before, strict=True)))
    return moved


def test_bf16_weights_have_fp32_masters():
    """In bf16 the first step would have been rounded away, and so each after it."""
    assert run_ranks(_slow, 1) == [[False, True, True, True]]


def _unbroken(rank, layout, folder, dtype):
    parallel = mesh.initialize(*layout)
    student, judges = _pair(parallel, dtype)
    _run(student, judges, range(2))
    how = dict(keep=1, source=qwen3(), averages=judges.followers)
    checkpoint.save(folder, student, {"step": 2}, **how)
    return _run(student, judges, range(2, 4)), _weights(judges.teachers[""].model, parallel)


def _resumed(rank, layout, folder, dtype):
    parallel = mesh.initialize(*layout)
    student, judges = _pair(parallel, dtype, seed=99)  # other weights
    path = checkpoint.latest(folder, parallel)
    state = checkpoint.load(path, student, judges.followers)
    assert state == {"step": 2}
    with pytest.raises(
        ValueError, match=r"it has running means \(weights=ema\) of teacher, but no"
    ):
        checkpoint.load(path, student)
    return _run(student, judges, range(2, 4)), _weights(judges.teachers[""].model, parallel)


@pytest.mark.parametrize(
    ("layout", "dtype"), [((2, 1), torch.float32), ((1, 2), torch.bfloat16)], ids=["TP2", "PP2"]
)
def test_resume_is_bit_equal(tmp_path, layout, dtype):
    expected = run_ranks(_unbroken, 2, layout, tmp_path, dtype)
    got = run_ranks(_resumed, 2, layout, tmp_path, dtype)
    for (history, weights), (resumed, restored) in zip(expected, got, strict=True):
        assert resumed == history
        assert all(torch.equal(weights[name], restored[name]) for name in weights)


def test_resume_in_another_layout(tmp_path):
    ((history, weights),) = run_ranks(_unbroken, 1, (1, 1), tmp_path, torch.float32)
    for layout in ((2, 1), (1, 2)):
        resumed, restored = run_ranks(_resumed, 2, layout, tmp_path, torch.float32)[0]
        for mine, theirs in zip(history, resumed, strict=True):
            assert theirs["teacher/ema_distance"] == pytest.approx(
                mine["teacher/ema_distance"], rel=1e-3
            )
        assert max((restored[n] - w).abs().max() for n, w in weights.items()) < 2e-3


def _other_teachers(rank, folder):
    parallel = mesh.initialize()
    student, judges = _pair(parallel)
    _run(student, judges, range(1))
    checkpoint.save(folder, student, {"step": 1}, keep=1, source=qwen3())
    with pytest.raises(ValueError) as raised:
        checkpoint.load(folder / "step_000001", student, judges.followers)
    return str(raised.value)


def test_a_checkpoint_without_the_mean_is_one_line(tmp_path):
    (line,) = run_ranks(_other_teachers, 1, tmp_path)
    assert line.startswith(f"{tmp_path}/step_000001: it has no running means (weights=ema), but")
    assert "of teacher are wanted; resume with the teachers" in line and "\n" not in line
