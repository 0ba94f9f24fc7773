"""The bytes that are counted are the bytes that real steps hand to gloo."""

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import architecture, build_model
from megatron_opd.packing import pack
from megatron_opd.planner import traffic
from megatron_opd.planner.layout import Layout
from megatron_opd.planner.network import Network
from megatron_opd.planner.traffic import Load
from megatron_opd.step import Judgement, make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.zigzag import part_of
from tests.distributed import run_ranks
from tests.hf import hf_model
from tests.planner.seen import Seen
from tests.tiny import VOCAB, make_rollouts, qwen3

STUDENT = qwen3(num_key_value_heads=2)
JUDGE = qwen3(vocab_size=47, hidden_size=48, intermediate_size=80, head_dim=12)
LENGTHS = [(3, 5), (7, 2), (4, 9), (2, 1), (6, 6), (5, 12), (9, 3), (1, 4)]
ADAMW = cfg.Optimizer()
OBJECTIVES = {
    "student_topk": Objective("student_topk", k=8),
    "teacher_topk": Objective("teacher_topk", k=4, normalize="vocab", tail=True),
    "union": Objective("union", k=4),
    "sampled": Objective("sampled", form="policy_gradient"),
    "full": Objective("full", "jsd"),
}


def _run(rank, layout: Layout, name: str, how: dict):
    """Score and train one step; return what was seen, and what the replica worked on."""
    options = (
        dict(hf=STUDENT, judge=JUDGE, measure=0.0, tied=False, optimizer=ADAMW, megatron={}) | how
    )
    parallel = mesh.initialize(
        layout.tp,
        layout.pp,
        vpp=layout.vpp,
        cp=layout.cp,
        ep=layout.ep,
        etp=layout.etp,
        sequence_parallel=layout.sequence_parallel,
    )
    build = dict(dtype=torch.float32)
    hf, optimizer = options["hf"] | {"tie_word_embeddings": options["tied"]}, options["optimizer"]
    model = build_model(hf, parallel, megatron=options["megatron"], **build)
    student = make_student(model, parallel, optimizer, steps=10, vocab_size=VOCAB)
    frozen = build_model(options["judge"], parallel, trainable=False, **build)
    teacher = MegatronTeacher(frozen, parallel, vocab_size=VOCAB)
    multiple = parallel.tp if parallel.sequence_parallel else 1
    mine = make_rollouts(LENGTHS)[parallel.dp_rank :: parallel.dp]
    how = dict(count=2, multiple=multiple, cp=parallel.cp, measure_fraction=options["measure"])
    batches = [
        part_of(whole, size=parallel.cp, rank=parallel.cp_rank, group=parallel.cp_group)
        for whole in pack(mine, microbatch_tokens=40, **how)
    ]
    with Seen(parallel) as scoring:
        judgements = [Judgement(scores) for scores in teacher.score(batches)]
    with Seen(parallel) as training:
        train_step(student, batches, judgements, OBJECTIVES[name])
    load = Load(
        tokens=sum(batch.token_T.numel() for batch in batches),
        supervised=sum(batch.target_N.numel() for batch in batches),
        microbatches=len(batches),
        measured=sum(batch.measured_M.numel() for batch in batches),
    )
    return dict(scoring.flows), dict(training.flows), load, parallel.pp_rank


def _counted(layout, name, load, stage, how):
    """Return (scoring, training) as the planner counts them."""
    hf = how.get("hf", STUDENT) | {"tie_word_embeddings": how.get("tied", False)}
    student = Network(architecture(hf), layout, width=4)
    teacher = Network(architecture(how.get("judge", JUDGE)), layout, width=4)
    recompute = how.get("megatron", {}).get("recompute_granularity") == "full"
    distributed = how.get("optimizer", ADAMW).distributed
    flows = traffic.train(
        student, OBJECTIVES[name], 1, load, stage, recompute=recompute, distributed=distributed
    )
    return [
        {(flow.axis, flow.kind): flow for flow in found}
        for found in (traffic.score(teacher, load, stage), flows)
    ]


def check(layout: Layout, name: str = "student_topk", **how) -> None:
    """Compare every rank's flows; where experts get what they get, all ranks' together."""
    routed = [[0.0, 0.0], [0.0, 0.0]]
    for *seen, load, stage in run_ranks(_run, layout.world, layout, name, how):
        counted = _counted(layout, name, load, stage, how)
        for phase, (expected, found) in enumerate(zip(counted, seen, strict=True)):
            assert expected.keys() == found.keys()
            for key, (size, calls) in found.items():
                if key == ("ep", "all_to_all"):
                    routed[phase][0] += expected[key].size
                    routed[phase][1] += size
                else:
                    assert expected[key].size == size, (key, load)
                # the loss and metrics call once a chunk, which is a matter of memory
                assert expected[key].calls <= calls
    assert all(expected == found for expected, found in routed)


DENSE = {
    "TP2": Layout(tp=2),
    "PP2": Layout(pp=2),
    "DP2": Layout(dp=2),
    "CP2": Layout(cp=2),
    "TP2+SP": Layout(tp=2, sequence_parallel=True),
    "TP2×PP2": Layout(tp=2, pp=2),
    "PP2×VPP2": Layout(pp=2, vpp=2),
    "TP2×CP2+SP": Layout(tp=2, cp=2, sequence_parallel=True),
    "TP2×PP2×DP2": Layout(tp=2, pp=2, dp=2),
}
EXPERTS = {
    "EP2": ("qwen3_moe", Layout(ep=2, dp=2)),
    "EP2×DP4": ("qwen3_moe", Layout(ep=2, dp=4)),
    "PP2×VPP2×EP2": ("qwen3_moe", Layout(pp=2, vpp=2, ep=2, dp=2)),
    "shared TP2×EP2+SP": ("qwen2_moe", Layout(tp=2, ep=2, dp=2, sequence_parallel=True)),
    "latent TP2+SP": ("deepseek_v3", Layout(tp=2, sequence_parallel=True)),
    "latent CP2×EP2": ("deepseek_v2", Layout(cp=2, ep=2, dp=2)),
}


@pytest.mark.parametrize("layout", DENSE.values(), ids=DENSE)
def test_a_step_moves_what_is_counted(layout):
    check(layout)


@pytest.mark.parametrize("family, layout", EXPERTS.values(), ids=EXPERTS)
def test_so_does_one_of_experts(family, layout):
    network = hf_model(family).config.to_dict()
    check(layout, hf=network, judge=network)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_so_does_every_support(name):
    check(Layout(tp=2), name, measure=0.5)


def test_so_do_tied_embeddings_recomputed_layers_and_shared_gradients():
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    full |= {"recompute_num_layers": 1}
    check(Layout(tp=2, pp=2), tied=True)
    check(Layout(tp=2, cp=2, sequence_parallel=True), megatron=full)
    check(Layout(ep=2, dp=2), megatron=full, hf=hf_model("qwen3_moe").config.to_dict())
    check(Layout(dp=2), optimizer=ADAMW.model_copy(update={"distributed": False}))
