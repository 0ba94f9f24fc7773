"""Outer products against autograd, one backward a token, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_opd import parallel as mesh
from megatron_opd.loss import Objective, Total
from megatron_opd.model import build_model, enter_head, forward
from megatron_opd.packing import pack
from megatron_opd.probes.gradients import head_products, layers, outer_products
from megatron_opd.types import HiddenScores
from tests.distributed import run_ranks
from tests.tiny import VOCAB, make_rollouts, qwen3

SHAPES = [(1, 5), (1, 4), (1, 6)]  # every position has a supervised token
TINY = qwen3(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
CHOSEN = torch.tensor([0, 3, 4, 8, 14])
OBJECTIVES = {
    "student_topk": Objective(k=4),
    "full": Objective(support="full"),
    "sampled": Objective(support="sampled", form="policy_gradient"),
    "tail": Objective(support="teacher_topk", k=4, normalize="vocab", tail=True, chunk_tokens=4),
    "weighted": Objective(
        k=4, weights={"position_decay": {"half_life": 3}}, aggregation="seq-mean-token-mean"
    ),
    "sum": Total((Objective(k=4), Objective(support="full", name="more", weight=0.3))),
}


def setting(parallel):
    """Return student, hidden states and loss of a microbatch, all in float64."""
    student, teacher = (
        build_model(TINY, parallel, dtype=torch.float64, seed=seed) for seed in (0, 1)
    )
    (batch,) = pack(make_rollouts(SHAPES), microbatch_tokens=100)
    with torch.no_grad():
        states = enter_head(forward(teacher, batch), parallel)[batch.source_N]
    scores = HiddenScores(states, teacher.head(VOCAB))

    def hidden():
        return enter_head(forward(student, batch), parallel)[batch.source_N]

    def loss(objective, hidden_NH, mask_N=None):
        masked = batch if mask_N is None else replace(batch, mask_N=mask_N)
        return objective(hidden_NH, student.head(VOCAB), masked, scores).loss

    return student.eval(), batch, scores, hidden, loss


def weights(student) -> dict[str, torch.Tensor]:
    """Return the gradients that the layers have got."""
    found = {name: layer.weight.grad for name, layer in layers(student).items()}
    return {**found, "head": student.head(VOCAB).weight_VH.grad[:VOCAB]}


def _token_by_token(rank):
    """Compare with a backward of each token's loss alone; return the largest differences."""
    student, batch, scores, hidden, loss = setting(mesh.initialize())
    objective, brute = OBJECTIVES["student_topk"], {}
    for token in CHOSEN:
        student.zero_grad()
        one_N = torch.zeros_like(batch.mask_N)
        one_N[token] = 1
        loss(objective, hidden(), one_N).backward()
        for name, gradient in weights(student).items():
            brute.setdefault(name, []).append(gradient.clone())
    student.zero_grad()
    found = products(student, batch, scores, hidden, loss, objective, CHOSEN)
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    differences = {}
    for name, gradients in brute.items():
        exact = np.stack([g.flatten().numpy() for g in gradients])
        told = np.einsum("nd,na->nda", *found[name]).reshape(exact.shape)
        assert np.abs(exact).max() > 1e-3
        differences[name] = np.abs(told - exact).max(), np.abs(exact).max()
    return differences


def products(student, batch, scores, hidden, loss, objective, chosen):
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    found = outer_products(student, batch, hidden, lambda h: loss(objective, h), chosen)
    head = student.head(VOCAB)
    with torch.no_grad():
        found["head"] = head_products(objective, hidden(), head, batch, scores, chosen)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    return found


def test_the_head_and_the_last_block_hold_the_gradient_of_each_tokens_loss():
    (differences,) = run_ranks(_token_by_token, 1)
    exact = {"head", "block 2 attention", "block 2 mlp"}
    assert set(differences) == exact | {"block 1 attention", "block 1 mlp"}
    for name, (difference, largest) in differences.items():
        if name in exact:
            assert difference < 1e-12
        else:  # position s is looked at by later tokens, and their losses go through it
            assert difference > 1e-3 * largest


def _sums(rank, name):
    """Return what all outer products leave of the gradient of one backward, layer by layer."""
    student, batch, scores, hidden, loss = setting(mesh.initialize())
    objective = OBJECTIVES[name]
    everything = torch.arange(len(batch.target_N))
    found = products(student, batch, scores, hidden, loss, objective, everything)
    hidden_NH = hidden()
    hidden_NH.retain_grad()
    loss(objective, hidden_NH).backward()
    head_VH = student.head(VOCAB).weight_VH.detach()[:VOCAB].numpy()
    of_hidden = np.abs(found["head"].error_nD @ head_VH - hidden_NH.grad.numpy()).max()
    sums = {
        layer: (np.abs(outer.error_nD.T @ outer.input_nA - exact.numpy()).max(), exact.norm())
        for layer, exact in weights(student).items()
        for outer in [found[layer]]
    }
    return of_hidden, sums


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_tokens_together_are_the_gradient_of_the_weights(name):
    ((of_hidden, sums),) = run_ranks(_sums, 1, name)
    assert of_hidden < 1e-12  # token by token: what the loss hands back to the network
    for difference, norm in sums.values():
        assert norm > 1e-2 and difference < 1e-12
