"""One update: the same weights at every layout, and from every way to cut the step into pieces."""

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf, init_random
from megatron_opd.packing import needed_microbatches, pack
from megatron_opd.step import make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from tests.distributed import run_ranks
from tests.tiny import VOCAB, make_rollouts, qwen3

SHAPES = [(3, 5), (7, 2), (4, 9), (2, 1), (6, 6), (5, 12), (9, 3), (1, 4)]
OBJECTIVES = {
    "student_topk": Objective("student_topk", k=8, chunk_tokens=7),
    "full": Objective("full", student_temperature=0.7, teacher_temperature=0.7, chunk_tokens=16),
    "sampled": Objective("sampled"),
    "cross_entropy": Objective("sampled", "cross_entropy", rollout_temperature=None),
}
TEACHER = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=80, head_dim=12)
# eps well above the rounding of a gradient: with 1e-8 Adam's first steps are the gradient's sign,
# and the sign of an entry that is zero up to rounding is noise of size lr
ADAMW = cfg.Optimizer(lr=1e-2, weight_decay=0.1, clip_norm=0.5, eps=1e-3)


def _parts(parallel, *, dtype, optimizer, tied, same=False):
    model = build_model(qwen3(tie_word_embeddings=tied), parallel, dtype=dtype)
    init_random(model, seed=1)
    hf = qwen3(tie_word_embeddings=tied) if same else qwen3(vocab_size=47, **TEACHER)
    frozen = build_model(hf, parallel, dtype=dtype, padded_vocab=model.vocab_size, trainable=False)
    init_random(frozen, seed=1 if same else 2)
    student = make_student(model, parallel, optimizer, steps=10, vocab_size=VOCAB)
    return student, MegatronTeacher(frozen, parallel, vocab_size=VOCAB)


def _train(rank, layout, objective, kwargs):
    """Take steps on fixed rollouts; return the metrics of each and the weights at the end."""
    options = dict(sp=False, dtype=torch.float32, optimizer=ADAMW, tied=False, steps=2)
    options |= dict(tokens=40, reverse=False, same=False) | kwargs
    parallel = mesh.initialize(*layout, sequence_parallel=options["sp"])
    student, teacher = _parts(
        parallel,
        **{name: options[name] for name in ("dtype", "optimizer", "tied", "same")},
    )
    rollouts = make_rollouts(SHAPES)[:: -1 if options["reverse"] else 1]
    mine = rollouts[parallel.dp_rank :: parallel.dp]
    count = max(parallel.agree(lambda: needed_microbatches(mine, options["tokens"])))
    multiple = parallel.tp if options["sp"] else 1
    batches = pack(mine, microbatch_tokens=options["tokens"], count=count, multiple=multiple)
    history = []
    for _ in range(options["steps"]):
        none = [None] * len(batches)
        scores = teacher.score(batches) if OBJECTIVES[objective].needs_teacher else none
        metrics = train_step(student, batches, scores, OBJECTIVES[objective])
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


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_layout_gives_the_weights_of_one_process(objective, layout):
    one = train((1, 1), objective)
    assert_same(one, train(objective=objective, **layout), atol=1e-6)
    moved = max(
        (one[1][n] - w).abs().max() for n, w in train((1, 1), objective, steps=0)[1].items()
    )
    assert moved > 1e-2  # two steps of lr 1e-2 went somewhere


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2×PP2"])
def test_tied_embeddings(layout):
    kwargs = dict(objective="student_topk", tied=True)
    assert_same(train((1, 1), **kwargs), train(**LAYOUTS[layout], **kwargs), atol=1e-6)


def test_invariant_to_microbatching_packing_and_order():
    one = train((1, 1), "student_topk", tokens=1000)  # one microbatch
    for pieces in (dict(tokens=20), dict(tokens=57, reverse=True)):
        assert_same(one, train((1, 1), "student_topk", **pieces), atol=1e-6)


def test_without_the_distributed_optimizer():
    plain = ADAMW.model_copy(update={"distributed": False})
    one = train((1, 1), "student_topk", world=2)
    assert_same(one, train((1, 1), "student_topk", world=2, optimizer=plain), atol=1e-6)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("objective", ["student_topk", "full", "sampled"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(objective, layout):
    still = cfg.Optimizer(lr=1e-2, weight_decay=0.0)
    for sp in {False, layout[0] > 1}:
        history, _ = train(layout, objective, same=True, optimizer=still, steps=1, sp=sp)
        assert abs(history[0]["loss/objective"]) < 1e-7
        # frozen and trained layers multiply in another order: log p − log q is 1e-7, not 0
        assert history[0]["optim/grad_norm"] < 1e-5
        assert history[0]["distill/overlap_ratio"] == 1.0
        assert abs(history[0]["distill/reverse_kl"]) < 1e-6


def _bf16(rank, lr):
    """Train in bf16; return how far the fp32 main weights and the bf16 ones went."""
    parallel = mesh.initialize()
    slow = cfg.Optimizer(lr=lr, weight_decay=0.0)
    student, teacher = _parts(parallel, dtype=torch.bfloat16, optimizer=slow, tied=False)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=1000)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    main = [p for group in student.optimizer.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in main]
    for _ in range(4):
        metrics = train_step(student, batches, teacher.score(batches), OBJECTIVES["full"])
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
    student, teacher = _parts(parallel, dtype=torch.float32, optimizer=ADAMW, tied=False)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=1000)
    scores = teacher.score(batches)
    if parallel.is_last_stage:
        scores[0].hidden_NH[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        train_step(student, batches, scores, OBJECTIVES["full"])
    return True


def test_a_gradient_that_is_not_finite_stops_every_rank():
    assert run_ranks(_explode, 2, (2, 1)) == [True, True]
    assert run_ranks(_explode, 2, (1, 2)) == [True, True]


def _schedule(rank, optimizer):
    parallel = mesh.initialize()
    student, _ = _parts(parallel, dtype=torch.float32, optimizer=optimizer, tied=False)
    batches = pack(make_rollouts(SHAPES), microbatch_tokens=1000)
    none = [None] * len(batches)
    rates = []
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
