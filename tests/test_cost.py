"""What a rollout costs, counted by hand."""

from dataclasses import replace

import pytest

from megatron_opd import build
from megatron_opd.config_file import load_config
from megatron_opd.cost import of_network, of_rollouts
from megatron_opd.model import architecture
from tests.home import make_home
from tests.tiny import make_prompts, make_rollouts

# of tests/home's student, 4 layers: q, k, v and the output 32 × 32, the three of the MLP 32 × 64
LAYERS, HEADS = 4 * (4 * 32 * 32 + 3 * 32 * 64), 4 * 4 * 8
COLUMNS = 384  # 260, padded to a multiple of 128
(ROLLOUT,) = make_rollouts([(10, 21)])  # 30 tokens


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_home(tmp_path)


def cost(rollout, *words):
    config = load_config(["config.yaml"], list(words))
    objective = build.build_objective(config)
    return of_rollouts(config, objective, build.judges(config, objective))(rollout)


def test_a_networks_forward_by_tokens_pairs_and_targets(home):
    assert of_network("student", layers=1, head=0)(30, 21) == 2 * LAYERS * 30 + 4 * HEADS * 450
    assert of_network("student", layers=2, head=3)(0, 21) == 3 * 2 * COLUMNS * 32 * 21
    assert architecture("student").layers == 2 * architecture("teacher").layers == 4


def test_the_student_works_three_times_and_its_teacher_once(home):
    layers = 2 * LAYERS * 30 + 4 * HEADS * 450
    head = 2 * COLUMNS * 32 * 21
    # of top ids the gradient costs nothing to speak of; the teacher has half the layers
    assert cost(ROLLOUT, "objective.support=student_topk") == 3.5 * layers + head
    assert cost(ROLLOUT, "objective.support=teacher_topk") == 3.5 * layers + head
    assert cost(ROLLOUT, "objective.support=full") == 3.5 * layers + 4 * head
    assert cost(ROLLOUT, "objective.support=full", "train.recompute=full") == pytest.approx(
        4.5 * layers + 4 * head
    )
    # for its top k the teacher multiplies its head out before the loss
    given = ["objective.support=teacher_topk", "teacher.payload=topk"]
    assert cost(ROLLOUT, *given) == 3.5 * layers + head
    alone = ["objective.support=sampled", "objective.divergence=cross_entropy", "teacher=null"]
    assert cost(ROLLOUT, *alone) == 3 * layers + 3 * head


def test_a_teacher_reads_its_own_prompt_and_judges_its_own_rollouts(home):
    words = ["teacher=null", "teachers={a: {path: student}, b: {path: teacher}}"]
    (read,) = make_prompts([40])
    longer = replace(ROLLOUT.prompt, teacher="a", teacher_token_ids=read.token_ids)
    by_a, by_b = (
        cost(replace(ROLLOUT, prompt=prompt), *words)
        for prompt in (longer, replace(ROLLOUT.prompt, teacher="b"))
    )
    one = of_network("student", layers=1, head=0)
    assert by_a - by_b == one(60, 21) - one(30, 21) / 2


def test_a_teacher_on_its_own_mesh_has_its_head_here_at_most(home):
    one = of_network("student", layers=3, head=0)(30, 21)
    head = of_network("teacher", layers=0, head=1)(30, 21)
    apart = ["teacher.parallel={tp: 2}", "objective.support=teacher_topk"]
    assert cost(ROLLOUT, *apart) == one + head
    assert cost(ROLLOUT, *apart, "teacher.payload=topk") == one


def test_attention_grows_with_the_square(home):
    one = of_network("student", layers=1, head=0)
    assert one(2000, 0) > 2 * one(1000, 0)
    assert one(2000, 0) - 2 * one(1000, 0) == 4 * HEADS * 1000**2
