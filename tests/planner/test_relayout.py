"""What judges on a mesh of their own send is what is counted."""

import pytest
import torch

from megatron_opd import parallel as mesh
from megatron_opd.model import build_model
from megatron_opd.planner import relayout
from megatron_opd.planner.layout import Layout
from megatron_opd.planner.traffic import Load
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.mesh import MeshTeacher
from tests.distributed import run_ranks
from tests.layouts import pack_here
from tests.tiny import VOCAB, make_rollouts, qwen3

EVEN = [(8, 24)] * 8  # two sequences of 31 tokens fill a microbatch
K = 4
PAIRS = {
    "DP2 asks TP2": (Layout(dp=2), Layout(tp=2)),
    "TP2 asks DP2": (Layout(tp=2), Layout(dp=2)),
    "DP4 asks TP2×PP2": (Layout(dp=4), Layout(tp=2, pp=2)),
    "PP2×DP2 asks TP4": (Layout(pp=2, dp=2), Layout(tp=4)),
}


def _score(rank, student: Layout, judging: Layout):
    """Return the bytes that a rank sends to score a step, and what its replica worked on."""
    parallel = mesh.initialize(student.tp, student.pp)
    own = mesh.another(tp=judging.tp, pp=judging.pp)
    with own.current():
        model = build_model(qwen3(), own, dtype=torch.float32, trainable=False)
    inner = MegatronTeacher(model, own, vocab_size=VOCAB, payload="topk", k=K)
    mine = make_rollouts(EVEN)[parallel.dp_rank :: parallel.dp]
    batches = pack_here(mine, parallel, microbatch_tokens=64)
    teacher = MeshTeacher(inner, parallel, None)
    teacher.score(batches)
    tokens = sum(batch.token_T.numel() for batch in batches)
    supervised = sum(batch.target_N.numel() for batch in batches)
    return teacher.bytes_sent, Load(tokens, supervised, len(batches))


@pytest.mark.parametrize("student, judging", PAIRS.values(), ids=PAIRS)
def test_each_rank_sends_what_is_counted(student, judging):
    sent = run_ranks(_score, student.world, student, judging)
    for rank, (seen, load) in enumerate(sent):
        counted = relayout.sent(student, judging, load, 8 * K, rank).size
        assert counted == pytest.approx(seen, rel=0.05)  # bounds of sequences travel too
    assert any(seen for seen, _ in sent)
