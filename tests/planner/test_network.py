"""Counted operations are those that torch counts in a real forward and backward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_opd import parallel as mesh
from megatron_opd.model import architecture, build_model
from megatron_opd.model.gpt import forward
from megatron_opd.packing import pack
from megatron_opd.planner.layout import Layout
from megatron_opd.planner.network import Network
from tests.distributed import run_ranks
from tests.hf import hf_model
from tests.tiny import make_rollouts

FAMILIES = ["qwen2", "qwen3_tied", "qwen3_moe", "qwen2_moe", "deepseek_v3"]
TWO = Layout(tp=2, sequence_parallel=True)  # whose experts are whole on each rank
LENGTHS = [(3, 5), (7, 2), (4, 9)]


def _count(rank, hf: dict, layout: Layout):
    """Return the operations of a forward, of its backward, and the packed lengths."""
    parallel = mesh.initialize(
        layout.tp, etp=layout.etp, sequence_parallel=layout.sequence_parallel
    )
    model = build_model(hf, parallel, dtype=torch.float32)
    (batch,) = pack(make_rollouts(LENGTHS), microbatch_tokens=100, multiple=layout.tp)
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter knows its products
        with FlopCounterMode(display=False) as ahead:
            hidden = forward(model[0], batch)
        with FlopCounterMode(display=False) as back:
            hidden.sum().backward()
    return ahead.get_total_flops(), back.get_total_flops(), batch.cu_seqlens.diff().tolist()


@pytest.mark.parametrize("layout", [Layout(), TWO], ids=["one rank", "TP2+SP"])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_forward_and_its_backward(family, layout):
    hf = hf_model(family).config.to_dict()
    for ahead, back, lengths in run_ranks(_count, layout.world, hf, layout):
        network = Network(architecture(hf), layout, width=4)
        pairs = sum(n * n for n in lengths)  # masked ones are multiplied all the same
        counted = sum(lengths) * network.matrix_flops(0) + pairs * network.attention_flops(0)
        assert ahead == counted
        assert back == 2 * counted
