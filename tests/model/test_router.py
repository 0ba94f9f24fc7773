"""Experts in training: every layout gives one process's weights, auxiliary losses included."""

from functools import cache

import pytest
import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, export_hf
from megatron_opd.packing import pack
from megatron_opd.step import Judgement, make_student, train_step
from tests.distributed import run_ranks
from tests.hf import hf_model
from tests.model.layouts import MIXTURE_LAYOUTS, join, world
from tests.tiny import VOCAB, make_rollouts

SHAPES = [(3, 5), (7, 2), (4, 9), (2, 1), (6, 6), (5, 12), (9, 3), (1, 4)]
AUXILIARY = {"moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 0.1}
ADAMW = cfg.Optimizer(lr=1e-2, clip_norm=0.5, eps=1e-3)  # see tests/test_step.py
LAYOUTS = {
    "PP2": dict(pp=2),
    "DP2": dict(dp=2),
    "TP2×ETP1+SP": dict(tp=2, etp=1, sequence_parallel=True),
    **{name: MIXTURE_LAYOUTS[name] for name in ("EP2", "TP2+SP", "TP2×EP2+SP")},
}


def config(family):
    network = hf_model(family).config.to_dict()
    return {**network, "vocab_size": 50, "initializer_range": 0.1}


def batches(replicas: int = 1, replica: int = 0):
    """Return a replica's share of the same four microbatches; padding counts as routed tokens."""
    groups = [make_rollouts(SHAPES)[i::4] for i in range(4)][replica::replicas]
    return [one for group in groups for one in pack(group, microbatch_tokens=1000, multiple=4)]


def _train(rank, family, layout, megatron, steps=2):
    parallel = join(layout)
    how = dict(dtype=torch.float32, padded_vocab=64, seed=1, megatron=megatron)
    model = build_model(config(family), parallel, **how)
    student = make_student(model, parallel, ADAMW, steps=10, vocab_size=VOCAB)
    mine, norms = batches(parallel.dp, parallel.dp_rank), []
    for _ in range(steps):
        objective = Objective("sampled", "cross_entropy", rollout_temperature=None)
        metrics = train_step(student, mine, [Judgement()] * len(mine), objective)
        norms.append(metrics.reduce(None, parallel.device)["optim/grad_norm"])
    return norms, {name: tensor.clone() for name, tensor in export_hf(model, parallel)}


@cache
def one_process(family, auxiliary):
    """Train on one rank, and check that auxiliary losses are a good part of the gradient."""
    ((norms, weights),) = run_ranks(_train, 1, family, {}, AUXILIARY if auxiliary else {})
    if auxiliary:
        assert abs(norms[0] / one_process(family, False)[0][0] - 1) > 0.05
    return norms, weights


def assert_every_rank_is_one_process(family, layout, auxiliary):
    norms, weights = one_process(family, auxiliary)
    megatron = AUXILIARY if auxiliary else {}
    for got, trained in run_ranks(_train, world(layout), family, layout, megatron):
        assert got == pytest.approx(norms, rel=1e-5)
        for name, tensor in weights.items():
            assert (trained[name] - tensor).abs().max() < 1e-6, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auxiliary_losses_give_the_weights_of_one_process(layout):
    assert_every_rank_is_one_process("qwen3_moe", LAYOUTS[layout], True)


@pytest.mark.parametrize("layout", ["TP2+SP", "TP2×EP2+SP"])
def test_latent_attention_and_shared_experts_train_as_in_one_process(layout):
    assert_every_rank_is_one_process("deepseek_v3", LAYOUTS[layout], False)


def _router_gradient(rank, aggregation, megatron):
    """Return the last router's gradient after one step, its weight before, and what it read."""
    parallel = mesh.initialize()
    how = dict(dtype=torch.float32, padded_vocab=64, seed=1, megatron=megatron)
    model = build_model(config("mixtral"), parallel, **how)
    loose = ADAMW.model_copy(update={"clip_norm": 1e9})
    student = make_student(model, parallel, loose, steps=10, vocab_size=VOCAB)
    router, read = model.chunks[0].decoder.layers[-1].mlp.router, []
    router.register_forward_pre_hook(
        lambda module, given: read.append(given[0].detach().flatten(0, 1))
    )
    before, mine = router.weight.detach().clone(), batches()
    objective = Objective(
        "sampled", "cross_entropy", rollout_temperature=None, aggregation=aggregation
    )
    train_step(student, mine, [Judgement()] * len(mine), objective)
    return router.weight.main_grad.clone(), before, read


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_auxiliary_losses_are_means_over_the_tokens_whatever_the_loss_is_divided_by(aggregation):
    ((plain, _, _),) = run_ranks(_router_gradient, 1, aggregation, {})
    ((both, weight_EH, read),) = run_ranks(_router_gradient, 1, aggregation, AUXILIARY)
    weight_EH.requires_grad_()
    total, tokens = torch.zeros(()), sum(len(x_TH) for x_TH in read)
    for x_TH in read:
        logits_TE = x_TH @ weight_EH.T
        share_E = logits_TE.softmax(-1).mean(0)
        chosen_E = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(2).indices, 0.5).mean(0)
        balance = len(share_E) * (share_E * chosen_E).sum()
        total = total + len(x_TH) * (balance + 0.1 * logits_TE.logsumexp(-1).square().mean())
    (expected,) = torch.autograd.grad(total / tokens, weight_EH)
    assert (both - plain - expected).norm() < 1e-5 * expected.norm()
