"""The pipeline schedule: what it needs more microbatches for, and what it may not be told."""

import pytest
import torch

from megatron_opd.model import architecture, build_model, transformer_config
from megatron_opd.model.pipeline import run_schedule
from tests.distributed import run_ranks
from tests.layouts import Layout, pack_here
from tests.tiny import VOCAB, make_rollouts, qwen3, qwen3_moe

COUNTS = {Layout(): [0, 1, 3], Layout(pp=2, vpp=2): [0, 1, 2, 3, 5], Layout(ep=2, dp=2): [0, 1]}


def _hidden(rank, layout, count):
    """Return the sums of the final hidden states of each microbatch, on the last stage."""
    parallel = layout.join()
    network = qwen3_moe() if layout.ep > 1 else qwen3()
    model = build_model(network, parallel, dtype=torch.float32, trainable=False, seed=1)
    rollouts = make_rollouts([(3 + i, 2 + 2 * i) for i in range(count)])
    mine = rollouts[parallel.dp_rank :: parallel.dp]
    batches = pack_here(mine, parallel, microbatch_tokens=99, count=len(mine)) if mine else []
    with torch.no_grad():
        seen = run_schedule(model, batches, lambda i, x: (i, float(x.sum())), forward_only=True)
    return seen if parallel.is_last_stage else None


@pytest.mark.parametrize("layout", COUNTS, ids=str)
def test_any_number_of_microbatches(layout):
    for count in COUNTS[layout]:
        last = [x for x in run_ranks(_hidden, layout.world, layout, count) if x is not None]
        told = sorted((i, total) for replica in last for i, total in replica)
        assert [i for i, _ in told] == list(range(count))
        assert len({total for _, total in told}) == count


def test_two_stages_may_not_send_both_ways_at_once():
    """Megatron matches the two with each other, and gradients are silently wrong."""
    arch, how = architecture(qwen3(vocab_size=VOCAB)), dict(dtype=torch.float32, pp=2)
    told = {"batch_p2p_comm": True}
    with pytest.raises(ValueError, match=r"megatron\.batch_p2p_comm=True: with parallel.pp=2 and"):
        transformer_config(arch, told, vpp=2, **how)
    assert transformer_config(arch, told, **how).batch_p2p_comm
    assert not transformer_config(arch, {}, vpp=2, **how).batch_p2p_comm
