"""A vLLM server as teacher: it says what the teacher on the student's own ranks says."""

import pytest
import torch

from megatron_opd import parallel as mesh
from megatron_opd.model import build_model, load_hf
from megatron_opd.packing import pack
from megatron_opd.rollout.server import Server
from megatron_opd.rollout.vllm_server import ServerEngine
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.server import ServerTeacher
from tests.distributed import run_ranks
from tests.rollout.needs_vllm import NEEDS_VLLM
from tests.tiny import make_rollouts
from tests.vllm_server import VOCAB, checkpoint, vllm_server

pytestmark = NEEDS_VLLM
SHAPES = [(3, 5), (7, 2), (4, 9), (2, 1), (1, 6)]
K = 6


def _scores(rank, url, folder, layout, payload):
    """Return what both teachers say of the same microbatches."""
    parallel = mesh.initialize(*layout, sequence_parallel=True)
    model = build_model(folder, parallel, dtype=torch.float32, seed=None, trainable=False)
    load_hf(model, folder, parallel, vocab_size=VOCAB)
    server, how = Server(url), {"vocab_size": VOCAB, "payload": payload, "k": K}
    engine = ServerEngine(model, parallel, server, vocab_size=VOCAB)
    engine.sync()  # the server has the teacher's weights now
    name = f"{engine.run}.{engine.version}"
    rollouts = make_rollouts(SHAPES, seed=parallel.dp_rank)
    batches = pack(rollouts, microbatch_tokens=20, multiple=parallel.tp)
    assert len(batches) > 1
    theirs = ServerTeacher(server, parallel, version=name, **how).score(batches)
    ours = MegatronTeacher(model, parallel, **how).score(batches)
    with pytest.raises(ValueError, match="not 'default' throughout"):
        hasty = Server(url, retries=0)
        ServerTeacher(hasty, parallel, **how).score(batches)  # not the weights it started with
    return theirs, ours


@pytest.mark.parametrize("payload", ["topk", "sampled"])
@pytest.mark.parametrize(("world", "layout"), [(1, (1, 1)), (2, (2, 1)), (2, (1, 2)), (2, (1, 1))])
def test_scores_equal_the_co_located_teachers(payload, world, layout):
    url, folder = vllm_server("qwen3").url, checkpoint("qwen3", 7)
    ranks = run_ranks(_scores, world, url, folder, layout, payload)
    if layout == (1, 2):
        assert all(one is None for one in ranks[0][0])
        ranks = ranks[1:]
    for theirs, ours in ranks:
        for one, other in zip(theirs, ours, strict=True):
            assert type(one) is type(other) and one.temperature == other.temperature
            if payload == "topk":
                assert torch.equal(one.ids_NK, other.ids_NK)
                assert (one.logp_NK - other.logp_NK).abs().max() < 2e-5
            else:
                assert (one.logp_N - other.logp_N).abs().max() < 2e-5
                assert one.logp_N.dtype == torch.float32
