"""One update: the same weights at every layout, and from every way to cut the step into pieces."""

import logging
from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.packing import pack
from megatron_opd.step import Judgement, Student, train_step
from tests.distributed import run_ranks
from tests.layouts import Layout, pack_here
from tests.tiny import VOCAB, make_rollouts, qwen3, qwen3_moe
from tests.training import ADAMW, ROLLOUTS, Setup, assert_same, judgements, make, train

OBJECTIVES = {
    "student_topk": Objective("student_topk", k=8, chunk_tokens=7),
    "full": Objective("full", student_temperature=0.7, teacher_temperature=0.7, chunk_tokens=16),
    "sampled": Objective("sampled", form="policy_gradient"),
    "cross_entropy": Objective("sampled", "cross_entropy", rollout_temperature=None),
}
WAYS = {  # everything else that a step is told by its microbatches and judges
    "rollout_topk": Objective("rollout_topk", k=8, chunk_tokens=9),
    "tail": Objective("student_topk", k=8, normalize="vocab", tail=True, chunk_tokens=7),
    "topk_payload": Objective(
        "teacher_topk", "forward_kl", k=8, normalize="vocab", tail=True, teacher_temperature=0.7
    ),
    "sampled_payload": Objective("sampled", form="policy_gradient", discount=0.9, baseline="mean"),
    "base": Objective("student_topk", k=8, extrapolation=1.25),
    "sampled_base": Objective("sampled", form="policy_gradient", extrapolation=1.25),
    "weights": Objective(
        "student_topk", k=8, weights={"student_entropy_top": {}, "position_decay": {"half_life": 9}}
    ),
    "sequence_sum": Objective("student_topk", k=8, aggregation="seq-mean-token-sum"),
    "sequence_mean": Objective("student_topk", k=8, aggregation="seq-mean-token-mean"),
    "sequence_norm": Objective(
        "student_topk", k=8, aggregation="seq-mean-token-sum-norm", fixed_length=9
    ),
}
PAYLOADS = {"topk_payload": "topk", "sampled_payload": "sampled"}
LAYOUTS = [  # tests/test_matrix.py has each axis alone
    Layout(tp=2, pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, cp=2, sp=True),
    Layout(tp=2, dp=2, sp=True),
]


def setup(name: str, **changes) -> Setup:
    """Return what a test steps with: an objective by its name, and the payload that it wants."""
    objective = (OBJECTIVES | WAYS)[name]
    return Setup(objective, PAYLOADS.get(name, "hidden"), **changes)


@cache
def one_process(name):
    """The weights of one process, after checking that two steps of lr 1e-2 went somewhere."""
    one, start = train(Layout(), setup(name)), train(Layout(), setup(name, steps=0))
    assert max((one[1][n] - w).abs().max() for n, w in start[1].items()) > 1e-2
    return one


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_layout_gives_the_weights_of_one_process(name, layout):
    assert_same(one_process(name), train(layout, setup(name)), atol=1e-6)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(cp=2, dp=2)], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_so_does_every_way_to_judge_weigh_and_aggregate(name, layout):
    assert_same(one_process(name), train(layout, setup(name)), atol=1e-6)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(pp=2, vpp=2)], ids=str)
def test_tied_embeddings(layout):
    tied = setup("student_topk", network=qwen3(tie_word_embeddings=True))
    assert_same(train(Layout(), tied), train(layout, tied), atol=1e-6)


EXPERTS = [
    Layout(ep=2, dp=2),
    Layout(tp=2, sp=True),
    Layout(tp=2, ep=2, etp=1, sp=True),
    Layout(tp=2, ep=2, dp=2, sp=True),
    Layout(etp=2, dp=2),
    Layout(pp=2, vpp=2),
    Layout(pp=2, ep=2, dp=2),
    Layout(cp=2, ep=2),
]


@cache
def experts(name):
    return train(Layout(), setup(name, network=qwen3_moe()))


@pytest.mark.parametrize("layout", EXPERTS, ids=str)
def test_experts(layout):
    how = setup("student_topk", network=qwen3_moe())
    assert_same(experts("student_topk"), train(layout, how), atol=1e-6)


AUX = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.01}
EVEN = tuple(make_rollouts([(5, 4), (3, 6), (9, 8), (2, 3), (4, 9)]))  # nothing to fill up


@pytest.mark.parametrize(
    "layout", [Layout(ep=2, dp=2), Layout(cp=2, ep=2), Layout(pp=2, vpp=2)], ids=str
)
def test_the_losses_of_routers(layout):
    """Means over microbatches: here the same at every layout, and empty ones that do not count."""
    how = dict(network=qwen3_moe(), rollouts=EVEN, alone=True, steps=1)
    with_it = setup("student_topk", megatron=AUX, **how)
    one = train(Layout(), with_it)
    without = train(Layout(), setup("student_topk", **how))
    assert any((one[1][name] - tensor).abs().max() > 1e-4 for name, tensor in without[1].items())
    assert_same(one, train(layout, with_it), atol=1e-6)


RECOMPUTE = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize(
    ("layout", "network"),
    [
        (Layout(pp=2, vpp=2), qwen3()),
        (Layout(tp=2, cp=2, sp=True), qwen3()),
        (Layout(ep=2, dp=2), qwen3_moe()),
    ],
    ids=["PP2·VPP2", "TP2×CP2+SP", "EP2"],
)
@pytest.mark.parametrize("what", RECOMPUTE)
def test_activations_that_are_computed_again(what, layout, network):
    aux = AUX if layout.ep > 1 else {}
    how = dict(network=network, rollouts=EVEN, alone=True)
    one = train(Layout(), setup("student_topk", megatron=aux, **how))
    again = setup("student_topk", megatron=aux | RECOMPUTE[what], **how)
    assert_same(one, train(layout, again), atol=1e-6)


OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 3000}


@pytest.mark.parametrize(
    ("layout", "network"),
    [
        (Layout(dp=2), qwen3()),
        (Layout(dp=2), qwen3(tie_word_embeddings=True)),
        (Layout(pp=2, dp=2), qwen3(tie_word_embeddings=True)),
        (Layout(pp=2, vpp=2, dp=2), qwen3()),
        (Layout(ep=2, dp=2), qwen3_moe()),
    ],
    ids=["DP2", "tied", "tied, PP2", "VPP2", "EP2"],
)
def test_gradients_that_travel_during_the_backward(layout, network):
    """Small buckets: the first update counts what comes into each, the others send it so."""
    how = dict(network=network, tokens=20, steps=3)  # other numbers of microbatches on the replicas
    one = train(Layout(), setup("student_topk", **how))
    assert_same(one, train(layout, setup("student_topk", ddp=OVERLAP, **how)), atol=1e-6)


@pytest.mark.parametrize("name", ["student_topk", "sampled_payload", "sequence_mean"])
def test_invariant_to_microbatching_packing_and_order(name):
    one = train(Layout(), setup(name, tokens=1000))  # one microbatch
    for pieces in (dict(tokens=20), dict(tokens=57, rollouts=ROLLOUTS[::-1])):
        assert_same(one, train(Layout(), setup(name, **pieces)), atol=1e-6)


@pytest.mark.parametrize("name", ["student_topk", "weights", "sequence_mean"])
def test_a_masked_response_is_as_good_as_none(name):
    masked = [replace(r, masked=i in (2, 5, 7)) for i, r in enumerate(ROLLOUTS)]
    without = train(Layout(), setup(name, rollouts=[r for r in masked if not r.masked]))
    # with 20 tokens a microbatch, some hold nothing else
    for layout, tokens in (
        (Layout(), 20),
        (Layout(pp=2), 20),
        (Layout(dp=2), 40),
        (Layout(), 40),
        (Layout(cp=2), 20),
    ):
        assert_same(without, train(layout, setup(name, rollouts=masked, tokens=tokens)), 1e-6)


def _nothing(rank, layout):
    """Take a step, one without a supervised token, and another; return the weights after each."""
    parallel = layout.join()
    network = qwen3_moe() if layout.ep > 1 else qwen3()
    student, teacher = make(setup("student_topk", network=network), parallel)
    rollouts, told = ROLLOUTS[parallel.dp_rank :: parallel.dp], []
    weights, norms = [], []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("megatron_opd").addHandler(handler)
    for masked in (False, True, False):
        masks = [replace(r, masked=masked) for r in rollouts]
        batches = pack_here(masks, parallel, microbatch_tokens=1000)
        judged = judgements(OBJECTIVES["student_topk"], batches, parallel, teacher)
        metrics = train_step(student, batches, judged, OBJECTIVES["student_topk"])
        record = metrics.reduce(None, parallel.device)
        norms.append(record["optim/grad_norm"])
        assert masked != ("loss/objective" in record)  # a mean over nothing is left out
        weights.append(torch.cat([p.detach().flatten() for p in student.model.parameters()]))
    return weights, norms, told


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(pp=2), Layout(dp=2), Layout(cp=2), Layout(ep=2, dp=2)], ids=str
)
def test_a_step_with_nothing_to_learn_from_changes_nothing_and_says_so(layout):
    for rank, (weights, norms, told) in enumerate(run_ranks(_nothing, layout.world, layout)):
        first, nothing, last = weights
        assert torch.equal(first, nothing) and not torch.equal(nothing, last)
        assert norms[1] == 0 and 0 < norms[2] < 100
        assert told == ["no token of this step is supervised: nothing is learned from it"][rank:]


class _ThroughAutograd(Student):
    """A student whose head gets its gradient as any other weight does."""

    def head(self):
        return self.model.head(self.vocab_size)


def _two_ways(rank, layout, tied):
    """Take two steps with each way to add up the head's gradient; return both heads' gradients."""
    parallel = layout.join()
    both = []
    for kind in (Student, _ThroughAutograd):
        how = setup("full", network=qwen3(tie_word_embeddings=tied))
        student, teacher = make(how, parallel)
        student = kind(**vars(student))
        batches = pack(ROLLOUTS, microbatch_tokens=40)
        for _ in range(2):
            judged = [Judgement(scores) for scores in teacher.score(batches)]
            train_step(student, batches, judged, OBJECTIVES["full"])
        weight = student.model.head(VOCAB).weight_VH if parallel.is_last_stage else None
        both.append(None if weight is None else weight.main_grad.clone())
    return both


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_gradient_is_the_same_at_once_and_through_autograd(layout, tied):
    for at_once, through_autograd in run_ranks(_two_ways, layout.world, layout, tied):
        if at_once is not None:
            assert (at_once - through_autograd).abs().max() < 1e-6 < at_once.abs().max()


def test_without_the_distributed_optimizer():
    plain = ADAMW.model_copy(update={"distributed": False})
    one = train(Layout(dp=2), setup("student_topk"))
    assert_same(one, train(Layout(dp=2), setup("student_topk", optimizer=plain)), atol=1e-6)


@pytest.mark.parametrize("layout", [(), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("objective", ["student_topk", "full", "sampled"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(objective, layout):
    still = cfg.Optimizer(lr=1e-2, weight_decay=0.0)
    how = setup(objective, teacher=None, optimizer=still, steps=1)
    for sp in {False, layout[:1] == (2,)}:
        history, _ = train(Layout(*layout, sp=sp), how)
        assert abs(history[0]["loss/objective"]) < 1e-7
        # frozen and trained layers multiply in another order: log p − log q is 1e-7, not 0
        assert history[0]["optim/grad_norm"] < 1e-5
        assert history[0]["distill/overlap_ratio"] == 1.0
        assert abs(history[0]["distill/reverse_kl"]) < 1e-6


def _bf16(rank, lr):
    """Train in bf16; return how far the fp32 main weights and the bf16 ones went."""
    parallel = mesh.initialize()
    slow = cfg.Optimizer(lr=lr, weight_decay=0.0)
    how = setup("full", dtype=torch.bfloat16, optimizer=slow)
    student, teacher = make(how, parallel)
    batches = pack(ROLLOUTS, microbatch_tokens=1000)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    main = [p for group in student.optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in main]
    for _ in range(4):
        judged = [Judgement(scores) for scores in teacher.score(batches)]
        metrics = train_step(student, batches, judged, OBJECTIVES["full"])
    finite = metrics.reduce(None, parallel.device)["loss/objective"]
    moved = max((p - q).abs().max() for p, q in zip(main, start, strict=True))
    kept = {p.dtype for p in main} == {torch.float32}
    same = [(p == before[name]).float().flatten() for name, p in student.model.named_parameters()]
    return float(moved), kept, float(torch.cat(same).mean()), finite


def test_bf16_keeps_main_weights_in_fp32():
    ((moved, kept, unchanged, loss),) = run_ranks(_bf16, 1, 1e-6)
    assert kept and 2e-6 < moved < 6e-6  # four steps of lr 1e-6 are all there ...
    assert unchanged > 0.9  # ... though bf16 itself could not have held most of them
    assert 0 < loss < 10


def _explode(rank, layout):
    parallel = mesh.initialize(*layout)
    student, teacher = make(setup("full"), parallel)
    batches = pack(ROLLOUTS, microbatch_tokens=1000)
    scores = teacher.score(batches)
    if parallel.is_last_stage:
        scores[0].hidden_NH[0, 0] = torch.nan
    judged = [Judgement(one) for one in scores]
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        train_step(student, batches, judged, OBJECTIVES["full"])
    return True


def test_a_gradient_that_is_not_finite_stops_every_rank():
    assert run_ranks(_explode, 2, (2, 1)) == [True, True]
    assert run_ranks(_explode, 2, (1, 2)) == [True, True]


def _schedule(rank, optimizer):
    parallel = mesh.initialize()
    student, _ = make(setup("cross_entropy", optimizer=optimizer), parallel)
    batches = pack(ROLLOUTS, microbatch_tokens=1000)
    none, rates = [Judgement()] * len(batches), []
    for _ in range(10):
        metrics = train_step(student, batches, none, OBJECTIVES["cross_entropy"])
        rates.append(metrics.reduce(None, parallel.device)["optim/lr"])
    decays = {group["wd_mult"]: group["weight_decay"] for group in student.optimizer.param_groups}
    return rates, decays


def test_learning_rate_schedule_wastes_no_step_and_norms_are_not_decayed():
    linear = cfg.Optimizer(lr=1.0e-3, warmup_steps=2, schedule="linear", weight_decay=0.1)
    ((rates, decays),) = run_ranks(_schedule, 1, linear)
    expected = [0.5, 1.0, *(1 - i / 9 for i in range(1, 9))]
    assert rates == pytest.approx([1e-3 * x for x in expected])
    assert decays == {1.0: 0.1, 0.0: 0.0}
