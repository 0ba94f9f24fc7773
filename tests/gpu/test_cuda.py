"""What only a GPU can show: the loss there, the engine there, and memory that is given back."""

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model
from megatron_opd.packing import pack
from megatron_opd.rollout import Sampling
from megatron_opd.rollout.megatron import MegatronEngine
from megatron_opd.step import Judgement, make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.types import Head, HiddenScores
from tests.loss.dense import batch_of, far, make_problem, reference
from tests.tiny import VOCAB, make_prompts, make_rollouts, qwen3

pytestmark = pytest.mark.gpu
OBJECTIVES = [
    Objective("student_topk", k=5, chunk_tokens=4),
    Objective("full", chunk_tokens=3),
    Objective("sampled", form="policy_gradient"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.support)
def test_loss_and_gradient_on_the_gpu(objective):
    problem = make_problem(v=40, k=5)
    want = reference(problem, objective)
    hidden = problem.student.hidden.cuda().requires_grad_()
    weight = problem.student.weight.cuda().requires_grad_()
    judged = objective(
        hidden,
        Head(weight, 40),
        batch_of(problem).to(torch.device("cuda")),
        HiddenScores(problem.teacher.hidden.cuda(), Head(problem.teacher.weight.cuda(), 40)),
    )
    judged.loss.backward()
    assert abs(judged.loss.item() - want["loss"].item()) < 1e-9
    assert far(hidden.grad.cpu(), want["hidden"]) < 1e-9
    assert far(weight.grad.cpu(), want["weight"]) < 1e-9


@pytest.fixture(scope="module")
def parallel():
    yield mesh.initialize()
    mesh.shutdown()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_its_own_rollouts(parallel, dtype):
    model = build_model(qwen3(), parallel, dtype=dtype, seed=1)
    student = make_student(model, parallel, cfg.Optimizer(lr=1e-3), steps=3, vocab_size=VOCAB)
    frozen = build_model(qwen3(), parallel, dtype=dtype, seed=2, trainable=False)
    teacher = MegatronTeacher(frozen, parallel, vocab_size=VOCAB, offload=True)
    engine = MegatronEngine(model, parallel, vocab_size=VOCAB, batch_size=4)
    sampling, losses = Sampling(max_tokens=12), []
    for step in range(3):
        rollouts = engine.generate(make_prompts([5, 9, 3]), n=2, sampling=sampling, seed=step)
        batches = [b.to(parallel.device) for b in pack(rollouts, microbatch_tokens=64)]
        judgements = [Judgement(scores) for scores in teacher.score(batches)]
        metrics = train_step(student, batches, judgements, OBJECTIVES[0])
        record = metrics.reduce(None, parallel.device)
        assert record["policy/mismatch_max"] < (1e-3 if dtype == torch.float32 else 0.5)
        losses.append(record["loss/objective"])
    assert all(0 < loss < 10 for loss in losses)


def test_offloading_gives_the_memory_back(parallel):
    big = qwen3(hidden_size=512, intermediate_size=2048, head_dim=64)
    before = torch.cuda.memory_allocated()
    model = build_model(big, parallel, dtype=torch.bfloat16, trainable=False)
    resident = torch.cuda.memory_allocated() - before
    teacher = MegatronTeacher(model, parallel, vocab_size=VOCAB, offload=True)
    assert torch.cuda.memory_allocated() - before < 0.1 * resident
    assert teacher.head is not None and teacher.head.weight_VH.is_cuda


def test_an_offloaded_optimizer_gives_its_memory_back(parallel):
    big = qwen3(hidden_size=512, intermediate_size=2048, head_dim=64)
    frozen = build_model(qwen3(), parallel, dtype=torch.bfloat16, seed=2, trainable=False)
    teacher = MegatronTeacher(frozen, parallel, vocab_size=VOCAB)
    batches = [b.to(parallel.device) for b in pack(make_rollouts([(3, 9)]), microbatch_tokens=64)]
    before = torch.cuda.memory_allocated()
    model = build_model(big, parallel, dtype=torch.bfloat16, seed=1)
    adamw = cfg.Optimizer(lr=1e-3, offload=True)
    student = make_student(model, parallel, adamw, steps=3, vocab_size=VOCAB)
    start = [p.detach().cpu() for p in model.parameters()]
    for _ in range(2):
        judgements = [Judgement(scores) for scores in teacher.score(batches)]
        train_step(student, batches, judgements, OBJECTIVES[0])
    weights = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.memory_allocated() - before < 1.5 * weights  # of 2 + 4 + 12 bytes, 2 stay
    assert any(not torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), start, strict=True))
