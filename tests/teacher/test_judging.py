"""Several teachers and other prompts: who judges what, and that it adds up at every layout."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd import parallel as mesh
from megatron_opd.judging import Judges
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf, load_hf
from megatron_opd.packing import pack
from megatron_opd.step import make_student, train_step
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.server import _passages
from tests.distributed import run_ranks
from tests.hf import hf_model, write_checkpoint
from tests.layouts import Layout, pack_here
from tests.tiny import VOCAB, make_prompts, make_rollouts, qwen3
from tests.training import ADAMW, PADDED, SHAPES, TEACHER, assert_same

TOPK = Objective("student_topk", k=8, chunk_tokens=7)
PAIR = ("code", "math")
PLAIN = ADAMW.model_copy(update={"clip_norm": 0.0, "distributed": False})


def routed(lengths=(9, 2, 6, 1, 11, 3, 7, 4)):
    """Rollouts that take turns between two teachers; code's are read after other prompts."""
    rollouts = make_rollouts(SHAPES)
    read = make_prompts(lengths, seed=5)
    return [
        replace(
            rollout,
            prompt=replace(
                rollout.prompt,
                teacher=PAIR[i % 2],
                teacher_token_ids=read[i].token_ids if i % 2 == 0 else None,
            ),
        )
        for i, rollout in enumerate(rollouts)
    ]


def _judges(parallel, names):
    """Teachers of different depth and width."""
    networks = {"code": TEACHER, "math": qwen3(num_hidden_layers=2)}
    built = {}
    for seed, name in enumerate(PAIR, 2):
        how = dict(dtype=torch.float32, padded_vocab=PADDED, trainable=False, seed=seed)
        model = build_model(networks[name], parallel, **how)
        built[name] = MegatronTeacher(model, parallel, vocab_size=VOCAB)
    return Judges({name: built[name] for name in names})


def _student(parallel, optimizer=ADAMW):
    how = dict(dtype=torch.float32, padded_vocab=PADDED, seed=1)
    model = build_model(qwen3(), parallel, **how)
    return make_student(model, parallel, optimizer, steps=10, vocab_size=VOCAB)


def _pack(parallel, rollouts, tokens, *, shares=None):
    mine = rollouts[parallel.dp_rank :: parallel.dp] if shares is None else shares[parallel.dp_rank]
    return pack_here(mine, parallel, microbatch_tokens=tokens, measure_fraction=0.5, seed=4)


def _train(rank, layout, how):
    """Take two steps; return the metrics of each and the weights at the end."""
    options = dict(tokens=40, reverse=False) | how
    parallel = layout.join()
    student, judges = _student(parallel), _judges(parallel, PAIR)
    rollouts = routed()[:: -1 if options["reverse"] else 1]
    batches, history = _pack(parallel, rollouts, options["tokens"]), []
    for _ in range(2):
        metrics = train_step(student, batches, judges.score(batches), TOPK)
        history.append(metrics.reduce(None, parallel.device))
    return history, {name: tensor.clone() for name, tensor in export_hf(student.model, parallel)}


@cache
def one_process():
    return run_ranks(_train, 1, Layout(), {})[0]


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        (Layout(tp=2, sp=True), {}),
        (Layout(pp=2), {}),
        (Layout(dp=2), {}),
        (Layout(cp=2), {}),
        (Layout(), dict(tokens=24, reverse=True)),
    ],
    ids=str,
)
def test_routing_and_other_prompts_at_every_layout_and_packing(layout, how):
    one = one_process()
    for history, weights in run_ranks(_train, layout.world, layout, how):
        assert_same(one, (history, weights), atol=1e-6)
    first = one[0][0]
    for name in ("teacher/nll", "distill/support_kl", "loss/objective"):
        assert first[f"{name}@code"] != first[f"{name}@math"]
        low, high = sorted((first[f"{name}@code"], first[f"{name}@math"]))
        assert low < first[name] < high  # the mean over both


def _gradient(rank, names, shares):
    """Return N times the gradient of one step, by parameter, and N."""
    parallel = mesh.initialize()
    student, judges = _student(parallel, PLAIN), _judges(parallel, names)
    mine = [r for r in routed() if r.prompt.teacher in names]
    # a replica without a sample of some teacher
    split = [[r for r in mine if r.prompt.teacher == name] for name in PAIR] if shares else None
    batches = _pack(parallel, mine, 40, shares=split)
    train_step(student, batches, judges.score(batches), TOPK)
    tokens = sum(len(r.response_ids) for r in mine)
    named = student.model.named_parameters()
    return {name: p.main_grad.double() * tokens for name, p in named}


def test_gradients_of_teachers_add_up_to_those_of_separate_runs():
    (code,), (math,) = (run_ranks(_gradient, 1, (name,), False) for name in PAIR)
    for both in (*run_ranks(_gradient, 1, PAIR, False), *run_ranks(_gradient, 2, PAIR, True)):
        for name, gradient in both.items():
            scale = gradient.abs().max()
            assert (gradient - code[name] - math[name]).abs().max() < 1e-6 * max(scale, 1), name


def _learn_from_itself(rank, layout, folder, objective, rollouts):
    """Take a step with the student as its teacher; return loss, gradient norm, and gradients."""
    parallel = mesh.initialize(*layout, sequence_parallel=layout[0] > 1)
    model = build_model(folder, parallel, dtype=torch.float32, seed=None)
    load_hf(model, folder, parallel)
    size = model.architecture.vocab_rows
    student = make_student(model, parallel, PLAIN, steps=10, vocab_size=size)
    judges = Judges({"": MegatronTeacher(student.model, parallel, vocab_size=size)})
    batches = _pack(parallel, rollouts, 40)
    metrics = train_step(student, batches, judges.score(batches), objective)
    record = metrics.reduce(None, parallel.device)
    with torch.no_grad():  # gradients under the names that transformers has for the weights
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in export_hf(model, parallel)}
    return record["loss/objective"], record["optim/grad_norm"], gradients


LAYOUTS = {"one": (1, 1), "TP2+SP": (2, 1), "PP2": (1, 2)}


@pytest.mark.parametrize(
    ("layout", "objective"),
    [((1, 1), Objective("full")), ((2, 1), Objective("full")), ((1, 2), TOPK)],
    ids=["full", "full, TP2+SP", "topk, PP2"],
)
def test_the_live_student_has_nothing_to_teach_after_the_same_prompt(tmp_path, layout, objective):
    folder = write_checkpoint(tmp_path, "qwen3")
    how = layout, folder, objective, make_rollouts(SHAPES)
    for loss, norm, _ in run_ranks(_learn_from_itself, layout[0] * layout[1], *how):
        assert abs(loss) < 1e-7 and norm < 1e-5


def dense_gradients(rollouts):
    """Mean of KL(student ‖ itself after the teacher's prompt), in float64, and its gradients."""
    model = hf_model("qwen3", dtype=torch.float64)

    def logp(prompt, response):
        logits = model(torch.tensor([[*prompt, *response[:-1]]])).logits[0]
        return logits[len(prompt) - 1 :].log_softmax(-1)

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        s = logp(rollout.prompt.token_ids, rollout.response_ids)
        t = logp(rollout.prompt.teacher_token_ids, rollout.response_ids).detach()
        total = total + (s.exp() * (s - t)).sum()
        tokens += len(s)
    (total / tokens).backward()
    return total.item() / tokens, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_live_student_with_another_prompt_is_the_dense_reference(tmp_path, layout):
    folder, rollouts = write_checkpoint(tmp_path, "qwen3"), make_rollouts(SHAPES)
    read = make_prompts((9, 2, 6, 1, 11, 3, 7, 4), seed=5)
    rollouts = [
        replace(r, prompt=replace(r.prompt, teacher_token_ids=prompt.token_ids))
        for r, prompt in zip(rollouts, read, strict=True)
    ]
    expected, dense = dense_gradients(rollouts)
    how = layout, folder, Objective("full", chunk_tokens=16), rollouts
    for loss, norm, gradients in run_ranks(_learn_from_itself, layout[0] * layout[1], *how):
        assert loss == pytest.approx(expected, rel=1e-5) and expected > 0.1 and norm > 0.1
        assert gradients.keys() == dense.keys()
        for name, gradient in gradients.items():
            error = (gradient - dense[name]).abs().max()
            assert error < 1e-5 * max(1, dense[name].abs().max()), name


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_a_server_is_asked_about_the_response_after_the_teachers_prompt(shapes):
    rollouts = make_rollouts([(prompt, response) for prompt, response, _ in shapes])
    read = make_prompts([length for *_, length in shapes], seed=3)
    rollouts = [
        replace(r, prompt=replace(r.prompt, teacher_token_ids=p.token_ids))
        for r, p in zip(rollouts, read, strict=True)
    ]
    asked = {
        (passage.token_ids, passage.start)
        for batch in pack(rollouts, microbatch_tokens=20, multiple=2)
        for passage in _passages(batch.as_judged())
    }
    told = ((r.prompt.teacher_token_ids, r.response_ids) for r in rollouts)
    assert asked == {((*prompt, *response), len(prompt)) for prompt, response in told}
