"""Steps on fixed rollouts at any layout: what they give must be what one process gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf
from megatron_opd.step import Judgement, Student, make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from tests.distributed import run_ranks
from tests.layouts import Layout, pack_here
from tests.tiny import VOCAB, make_rollouts, qwen3

SHAPES = [(3, 5), (7, 2), (4, 9), (2, 1), (6, 6), (5, 12), (9, 3), (1, 4)]
ROLLOUTS = tuple(make_rollouts(SHAPES, top=8))
PADDED = 64  # rows of both heads: with tp 2, the second rank owns some of the 45 ids, and padding
TEACHER = qwen3(
    vocab_size=47, num_hidden_layers=8, hidden_size=48, intermediate_size=80, head_dim=12
)
# eps well above the rounding of a gradient: with 1e-8 Adam's first steps are the gradient's sign,
# and the sign of an entry that is zero up to rounding is noise of size lr
ADAMW = cfg.Optimizer(lr=1e-2, weight_decay=0.1, clip_norm=0.5, eps=1e-3)


@dataclass(frozen=True)
class Setup:
    """Models, loss and data of a few steps."""

    objective: Objective
    payload: str = "hidden"
    network: Mapping = field(default_factory=qwen3)
    teacher: Mapping | None = field(
        default_factory=lambda: TEACHER
    )  # None: the student's network and weights
    rollouts: Sequence = ROLLOUTS
    tokens: int = 40  # of a microbatch
    alone: bool = False  # every rollout in a microbatch of its own
    steps: int = 2
    optimizer: cfg.Optimizer = ADAMW
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None  # None: the student's
    megatron: Mapping = field(default_factory=dict)
    ddp: Mapping = field(default_factory=dict)


def make(setup: Setup, parallel) -> tuple[Student, MegatronTeacher]:
    """Build a student and its teacher, from one seed each."""
    model = build_model(
        setup.network,
        parallel,
        dtype=setup.dtype,
        padded_vocab=PADDED,
        seed=1,
        megatron=setup.megatron,
    )
    student = make_student(
        model, parallel, setup.optimizer, steps=10, vocab_size=VOCAB, ddp=setup.ddp
    )
    objective, alike = setup.objective, setup.teacher is None
    how = {"payload": setup.payload, "k": objective.k}
    how["temperature"] = objective.teacher_temperature
    hf = setup.network if setup.teacher is None else setup.teacher
    dtype = setup.teacher_dtype or setup.dtype
    return student, judge(parallel, hf, dtype, seed=1 if alike else 2, **how)


def judge(parallel, hf, dtype=torch.float32, *, seed, **how) -> MegatronTeacher:
    """Build a frozen model that judges."""
    frozen = build_model(hf, parallel, dtype=dtype, padded_vocab=PADDED, trainable=False, seed=seed)
    return MegatronTeacher(frozen, parallel, vocab_size=VOCAB, **how)


def judgements(objective: Objective, batches, parallel, teacher) -> list[Judgement]:
    """Ask whom the objective asks."""
    judges, none = [teacher if objective.needs_teacher else None, None], [None] * len(batches)
    if objective.needs_base:
        payload = "sampled" if objective.support == "sampled" else "hidden"
        judges[1] = judge(parallel, qwen3(), seed=3, payload=payload)
    scores = [judge.score(batches) if judge else none for judge in judges]
    return [Judgement(*pair) for pair in zip(*scores, strict=True)]


def _train(rank, layout, setup):
    """Take steps; return the metrics of each and the weights at the end."""
    parallel = layout.join()
    student, teacher = make(setup, parallel)
    mine = setup.rollouts[parallel.dp_rank :: parallel.dp]
    how = {"microbatch_tokens": setup.tokens, "count": len(mine) if setup.alone else None}
    batches = pack_here(mine, parallel, measure_fraction=0.5, seed=4, **how)
    history = []
    for _ in range(setup.steps):
        judged = judgements(setup.objective, batches, parallel, teacher)
        metrics = train_step(student, batches, judged, setup.objective)
        history.append(metrics.reduce(None, parallel.device))
    return history, {name: tensor.clone() for name, tensor in export_hf(student.model, parallel)}


def train(layout: Layout, setup: Setup):
    """Return rank 0's metrics and weights, after checking that all ranks have the same weights."""
    ranks = run_ranks(_train, layout.world, layout, setup, timeout=60)
    for _, weights in ranks[1:]:
        assert all(torch.equal(weights[name], ranks[0][1][name]) for name in weights)
    return ranks[0]


def assert_same(one, other, atol):
    """Check metrics, and weights to `atol`."""
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-5), name
    for name, tensor in one[1].items():
        assert (tensor - other[1][name]).abs().max() < atol, name
