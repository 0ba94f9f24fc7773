"""Student and teacher may differ in everything but the tokenizer: networks, sizes, dtypes."""

from functools import cache

import pytest
import torch

from megatron_opd.loss import Objective
from tests.hf import hf_config
from tests.layouts import Layout
from tests.training import Setup, assert_same, train

TP2, PP2, EP2 = Layout(tp=2, sp=True), Layout(pp=2), Layout(ep=2, dp=2)
PAIRS = {  # student ← teacher: layouts
    ("qwen3", "qwen3_moe"): (TP2, EP2),  # experts on one side alone
    ("qwen3_moe", "qwen3"): (TP2, EP2),
    ("mixtral", "qwen2_moe"): (PP2, EP2),
    ("qwen3_yarn", "deepseek_v3"): (TP2, PP2, EP2),  # latent attention, sigmoid router, groups
    ("deepseek_v2", "mistral"): (TP2, EP2),
    ("gemma", "llama"): (TP2, PP2),  # scaled embeddings and zero-centred norms on one side alone
    ("qwen2", "gemma"): (TP2, PP2),
    ("qwen3_tied", "llama_linear"): (TP2, PP2),  # tied ← untied
}
CELLS = [(pair, layout) for pair, layouts in PAIRS.items() for layout in layouts]
DRAWN = {"vocab_size": 47, "initializer_range": 0.1}  # far from uniform
LARGER = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
WHOLE, CHOSEN = Objective("full", "jsd", chunk_tokens=16), Objective("student_topk", k=8)


def setup(student: str, teacher: str, **how) -> Setup:
    """Return one step of a pair in which nothing but the vocabulary is of one size."""
    networks = hf_config(student, **DRAWN), hf_config(teacher, **DRAWN, **LARGER)
    small, large = (config.to_dict() for config in networks)
    objective = WHOLE if student < teacher else CHOSEN
    return Setup(objective, network=small, teacher=large, steps=1, **how)


@cache
def one_process(student: str, teacher: str):
    return train(Layout(), setup(student, teacher))


@pytest.mark.parametrize(
    ("pair", "layout"), CELLS, ids=[f"{a} from {b}-{layout}" for (a, b), layout in CELLS]
)
def test_a_pair_gives_the_loss_and_weights_of_one_process(pair, layout):
    one = one_process(*pair)
    assert one[0][0]["distill/reverse_kl"] > 0.1  # they have something to say to each other
    assert_same(one, train(layout, setup(*pair)), atol=1e-6)


def test_a_teacher_of_another_dtype():
    """Its stages pass on what it rounds: the same numbers in one process and in two."""
    how = setup("qwen3", "gemma", teacher_dtype=torch.bfloat16)
    rounded = train(Layout(), how)
    assert_same(rounded, train(PP2, how), atol=1e-6)
    exact = train(Layout(), setup("qwen3", "gemma"))
    assert rounded[0][0]["teacher/nll"] == pytest.approx(exact[0][0]["teacher/nll"], rel=0.02)
    assert rounded[0][0]["teacher/nll"] != exact[0][0]["teacher/nll"]
