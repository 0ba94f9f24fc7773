"""One update: the same weights at every layout, and from every way to cut the step into pieces."""

import logging
from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf
from megatron_opd.packing import needed_microbatches, pack
from megatron_opd.step import Judgement, Student, make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from tests.distributed import run_ranks
from tests.tiny import VOCAB, make_rollouts, qwen3

SHAPES = [(3, 5), (7, 2), (4, 9), (2, 1), (6, 6), (5, 12), (9, 3), (1, 4)]
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
PADDED = 64  # rows of both heads: with tp 2, the second rank owns some of the 45 ids, and padding
TEACHER = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=80, head_dim=12)
# eps well above the rounding of a gradient: with 1e-8 Adam's first steps are the gradient's sign,
# and the sign of an entry that is zero up to rounding is noise of size lr
ADAMW = cfg.Optimizer(lr=1e-2, weight_decay=0.1, clip_norm=0.5, eps=1e-3)


def _parts(parallel, *, dtype=torch.float32, optimizer=ADAMW, tied=False, same=False, **how):
    hf = qwen3(tie_word_embeddings=tied)
    model = build_model(hf, parallel, dtype=dtype, padded_vocab=PADDED, seed=1)
    judge = hf if same else qwen3(vocab_size=47, **TEACHER)
    student = make_student(model, parallel, optimizer, steps=10, vocab_size=VOCAB)
    return student, _judge(parallel, judge, dtype, 1 if same else 2, **how)


def _judge(parallel, hf, dtype, seed, **how):
    frozen = build_model(hf, parallel, dtype=dtype, padded_vocab=PADDED, trainable=False, seed=seed)
    return MegatronTeacher(frozen, parallel, vocab_size=VOCAB, **how)


def _judgements(name, batches, parallel, teacher):
    """Ask whom the objective asks."""
    objective, none = (OBJECTIVES | WAYS)[name], [None] * len(batches)
    judges = [teacher if objective.needs_teacher else None, None]
    if objective.needs_base:
        payload = "sampled" if objective.support == "sampled" else "hidden"
        judges[1] = _judge(parallel, qwen3(), torch.float32, seed=3, payload=payload)
    scores = [judge.score(batches) if judge else none for judge in judges]
    return [Judgement(*pair) for pair in zip(*scores, strict=True)]


def _train(rank, layout, name, kwargs):
    """Take steps on fixed rollouts; return the metrics of each and the weights at the end."""
    options = dict(sp=False, tokens=40, reverse=False, rollouts=make_rollouts(SHAPES, top=8))
    options |= dict(steps=2, parts={}) | kwargs
    parallel = mesh.initialize(*layout, sequence_parallel=options["sp"])
    objective = (OBJECTIVES | WAYS)[name]
    payload = dict(payload=PAYLOADS.get(name, "hidden"), k=objective.k)
    payload |= dict(temperature=objective.teacher_temperature)
    student, teacher = _parts(parallel, **options["parts"], **payload)
    rollouts = options["rollouts"][:: -1 if options["reverse"] else 1]
    mine = rollouts[parallel.dp_rank :: parallel.dp]
    count = max(parallel.agree(lambda: needed_microbatches(mine, options["tokens"])))
    batches = pack(
        mine,
        microbatch_tokens=options["tokens"],
        count=count,
        multiple=parallel.tp if options["sp"] else 1,
        measure_fraction=0.5,
        seed=4,
    )
    history = []
    for _ in range(options["steps"]):
        judgements = _judgements(name, batches, parallel, teacher)
        metrics = train_step(student, batches, judgements, objective)
        history.append(metrics.reduce(None, parallel.device))
    return history, {name: tensor.clone() for name, tensor in export_hf(student.model, parallel)}


def train(layout, objective, world=None, **kwargs):
    ranks = run_ranks(_train, world or layout[0] * layout[1], layout, objective, kwargs)
    for _, weights in ranks[1:]:
        assert all(torch.equal(weights[name], ranks[0][1][name]) for name in weights)
    return ranks[0]


def assert_same(one, other, atol):
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-5), name
    for name, tensor in one[1].items():
        assert (tensor - other[1][name]).abs().max() < atol, name


LAYOUTS = {
    "TP2": dict(layout=(2, 1)),
    "PP2": dict(layout=(1, 2)),
    "TP2×PP2": dict(layout=(2, 2)),
    "DP2": dict(layout=(1, 1), world=2),
    "TP2+SP": dict(layout=(2, 1), sp=True),
    "TP2×DP2+SP": dict(layout=(2, 1), world=4, sp=True),
}


@cache
def one_process(name):
    """The weights of one process, after checking that two steps of lr 1e-2 went somewhere."""
    one, start = train((1, 1), name), train((1, 1), name, steps=0)
    assert max((one[1][n] - w).abs().max() for n, w in start[1].items()) > 1e-2
    return one


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_layout_gives_the_weights_of_one_process(name, layout):
    assert_same(one_process(name), train(objective=name, **layout), atol=1e-6)


@pytest.mark.parametrize("layout", ["TP2×PP2", "TP2×DP2+SP"])
@pytest.mark.parametrize("name", WAYS)
def test_so_does_every_way_to_judge_weigh_and_aggregate(name, layout):
    assert_same(one_process(name), train(objective=name, **LAYOUTS[layout]), atol=1e-6)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2×PP2"])
def test_tied_embeddings(layout):
    kwargs = dict(objective="student_topk", parts=dict(tied=True))
    assert_same(train((1, 1), **kwargs), train(**LAYOUTS[layout], **kwargs), atol=1e-6)


@pytest.mark.parametrize("name", ["student_topk", "sampled_payload", "sequence_mean"])
def test_invariant_to_microbatching_packing_and_order(name):
    one = train((1, 1), name, tokens=1000)  # one microbatch
    for pieces in (dict(tokens=20), dict(tokens=57, reverse=True)):
        assert_same(one, train((1, 1), name, **pieces), atol=1e-6)


@pytest.mark.parametrize("name", ["student_topk", "weights", "sequence_mean"])
def test_a_masked_response_is_as_good_as_none(name):
    rollouts = make_rollouts(SHAPES, top=8)
    masked = [replace(r, masked=i in (2, 5, 7)) for i, r in enumerate(rollouts)]
    without = train((1, 1), name, rollouts=[r for r in masked if not r.masked])
    # with 20 tokens a microbatch, some hold nothing else
    for how in (dict(tokens=20), dict(layout=(1, 2), tokens=20), dict(world=2), {}):
        assert_same(
            without, train(objective=name, rollouts=masked, **dict(layout=(1, 1)) | how), 1e-6
        )


def _nothing(rank, layout):
    """Take a step, one without a supervised token, and another; return the weights after each."""
    parallel = mesh.initialize(*layout)
    student, teacher = _parts(parallel)
    rollouts, told, weights, norms = (
        make_rollouts(SHAPES)[parallel.dp_rank :: parallel.dp],
        [],
        [],
        [],
    )
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("megatron_opd").addHandler(handler)
    for masked in (False, True, False):
        batches = pack([replace(r, masked=masked) for r in rollouts], microbatch_tokens=1000)
        judgements = _judgements("student_topk", batches, parallel, teacher)
        metrics = train_step(student, batches, judgements, OBJECTIVES["student_topk"])
        record = metrics.reduce(None, parallel.device)
        norms.append(record["optim/grad_norm"])
        assert masked != ("loss/objective" in record)  # a mean over nothing is left out
        weights.append(torch.cat([p.detach().flatten() for p in student.model.parameters()]))
    return weights, norms, told


@pytest.mark.parametrize("layout, world", [((1, 1), 1), ((1, 2), 2), ((1, 1), 2)])
def test_a_step_with_nothing_to_learn_from_changes_nothing_and_says_so(layout, world):
    for rank, (weights, norms, told) in enumerate(run_ranks(_nothing, world, layout)):
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
    parallel = mesh.initialize(*layout)
    both = []
    for kind in (Student, _ThroughAutograd):
        student, teacher = _parts(parallel, tied=tied)
        student = kind(**vars(student))
        batches = pack(make_rollouts(SHAPES), microbatch_tokens=40)
        for _ in range(2):
            judgements = [Judgement(scores) for scores in teacher.score(batches)]
            train_step(student, batches, judgements, OBJECTIVES["full"])
        weight = student.model.head(VOCAB).weight_VH if parallel.is_last_stage else None
        both.append(None if weight is None else weight.main_grad.clone())
    return both


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_gradient_is_the_same_at_once_and_through_autograd(layout, tied):
    for at_once, through_autograd in run_ranks(_two_ways, layout[0] * layout[1], layout, tied):
        if at_once is not None:
            assert (at_once - through_autograd).abs().max() < 1e-6 < at_once.abs().max()


def test_without_the_distributed_optimizer():
    plain = ADAMW.model_copy(update={"distributed": False})
    one = train((1, 1), "student_topk", world=2)
    other = train((1, 1), "student_topk", world=2, parts=dict(optimizer=plain))
    assert_same(one, other, atol=1e-6)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("objective", ["student_topk", "full", "sampled"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(objective, layout):
    still = cfg.Optimizer(lr=1e-2, weight_decay=0.0)
    parts = dict(same=True, optimizer=still)
    for sp in {False, layout[0] > 1}:
        history, _ = train(layout, objective, parts=parts, steps=1, sp=sp)
        assert abs(history[0]["loss/objective"]) < 1e-7
        # frozen and trained layers multiply in another order: log p − log q is 1e-7, not 0
        assert history[0]["optim/grad_norm"] < 1e-5
        assert history[0]["distill/overlap_ratio"] == 1.0
        assert abs(history[0]["distill/reverse_kl"]) < 1e-6


def _bf16(rank, lr):
    """Train in bf16; return how far the fp32 main weights and the bf16 ones went."""
    parallel = mesh.initialize()
    slow = cfg.Optimizer(lr=lr, weight_decay=0.0)
    student, teacher = _parts(parallel, dtype=torch.bfloat16, optimizer=slow)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=1000)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    main = [p for group in student.optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in main]
    for _ in range(4):
        judgements = [Judgement(scores) for scores in teacher.score(batches)]
        metrics = train_step(student, batches, judgements, OBJECTIVES["full"])
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
    student, teacher = _parts(parallel)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=1000)
    scores = teacher.score(batches)
    if parallel.is_last_stage:
        scores[0].hidden_NH[0, 0] = torch.nan
    judgements = [Judgement(one) for one in scores]
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        train_step(student, batches, judgements, OBJECTIVES["full"])
    return True


def test_a_gradient_that_is_not_finite_stops_every_rank():
    assert run_ranks(_explode, 2, (2, 1)) == [True, True]
    assert run_ranks(_explode, 2, (1, 2)) == [True, True]


def _schedule(rank, optimizer):
    parallel = mesh.initialize()
    student, _ = _parts(parallel, optimizer=optimizer)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=1000)
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
