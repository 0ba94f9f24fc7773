"""A model that only writes: what it writes is a run's, on any number of ranks."""

import pytest
import torch

from megatron_opd import parallel as mesh
from megatron_opd.data import load_prompts
from megatron_opd.rollout import Sampling
from megatron_opd.writer import Writer
from tests.distributed import run_ranks
from tests.hf import hf_model
from tests.writing import make_model, make_questions

HOW = {"dtype": "float32", "max_prompt_tokens": 64, "max_tokens": 12, "batch_size": 4}


def _write(rank, folder, questions, tp, n):
    with Writer.open(str(folder), tp=tp, **HOW) as writer:
        prompts = load_prompts(writer.config.data, writer.tokenizer, [str(questions)])
        how = Sampling(12, stop_ids=writer.stop_ids)
        rollouts = writer.generate(prompts, n=n, sampling=how, seed=5)
        again = writer.generate(prompts[2:4], n=n, sampling=how, seed=5)
        return rollouts, again, writer.stop_ids


def ids(rollouts) -> list:
    return [rollout.response_ids for rollout in rollouts]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    return make_model(folder / "model"), make_questions(folder / "questions.jsonl")


def test_the_layout_of_ranks_does_not_change_what_is_written(home):
    (one, again, stops), *_ = run_ranks(_write, 1, *home, 1, 2)
    assert {2, 21} <= set(stops)
    assert [(r.prompt.index, r.sample) for r in one] == [(i, s) for i in range(7) for s in (0, 1)]
    assert {r.finish for r in one} == {"stop", "length"}
    assert ids(again) == ids(one[4:8])  # whoever is asked with them
    for world, tp in ((2, 2), (4, 2)):
        for rollouts, _, _ in run_ranks(_write, world, *home, tp, 2):
            assert ids(rollouts) == ids(one)


def test_a_mixture_of_experts_is_split_too(home, tmp_path):
    model = make_model(tmp_path / "model", family="qwen3_moe")
    (one, *_), *_ = run_ranks(_write, 1, model, home[1], 1, 1)
    for rollouts, *_ in run_ranks(_write, 2, model, home[1], 2, 1):
        assert ids(rollouts) == ids(one)


def test_replicas_without_a_prompt_write_nothing(home):
    for rollouts, again, _ in run_ranks(_write, 3, *home, 1, 1):
        assert len(rollouts) == 7 and ids(again) == ids(rollouts[2:4])


def test_it_writes_what_transformers_would(home):
    def greedy(rank):
        with Writer.open(str(home[0]), **HOW) as writer:
            prompts = load_prompts(writer.config.data, writer.tokenizer, [str(home[1])])
            how = Sampling(12, temperature=0.0, stop_ids=writer.stop_ids)
            return writer.generate(prompts, sampling=how)

    model = hf_model("qwen3", vocab_size=260, num_hidden_layers=2)
    for rollout in run_ranks(greedy, 1)[0]:
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        with torch.no_grad():
            logits_TV = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1, :259]
        assert tuple(logits_TV.argmax(-1).tolist()) == rollout.response_ids


def test_two_writers_share_groups_that_stay(home):
    def both(rank):
        parallel = mesh.initialize(2)
        with (
            Writer.open(str(home[0]), parallel=parallel, **HOW) as one,
            Writer.open(str(home[0]), parallel=parallel, **HOW) as other,
        ):
            prompts = load_prompts(one.config.data, one.tokenizer, [str(home[1])])
            how = Sampling(6, stop_ids=one.stop_ids)
            written = [w.generate(prompts, sampling=how, seed=1) for w in (one, other)]
        assert parallel.owner(lambda: 1) == 1
        return written[0] == written[1]

    assert run_ranks(both, 2) == [True, True]


def test_errors_are_one_line_before_weights_are_read(home, tmp_path):
    broken = tmp_path / "broken"
    make_model(broken)
    (broken / "model.safetensors").unlink()
    long = {**HOW, "max_tokens": 900}
    cases = [
        ({"path": str(tmp_path / "no")}, HOW, "student.path: no directory"),
        ({"path": str(broken)}, HOW, "has no *.safetensors weights"),
        ({"path": str(home[0])}, long, "max_position_embeddings=256"),
        ({"path": str(home[0]), "tp": 3}, HOW, "parallel: tp=3 × pp=1 needs a multiple of 3 ranks"),
        ({"path": str(home[0]), "engine": "vllm_server"}, HOW, "rollout.url: missing"),
        ({"path": str(home[0]), "engine": "pen"}, HOW, "rollout.engine: got"),
        ({"path": str(home[0]), "data": {"tempalte": "x"}}, HOW, "did you mean data.template"),
    ]

    def tell(rank, words, how):
        with pytest.raises(ValueError) as error:
            Writer.open(**words, **how)
        return str(error.value)

    for words, how, told in cases:
        line = run_ranks(tell, 1, words, how)[0]
        assert told in line and "\n" not in line, line


def test_weights_are_read_when_they_are_needed(home):
    def look(rank):
        with Writer.open(str(home[0]), **HOW) as writer:
            return "engine" in vars(writer)

    assert run_ranks(look, 1) == [False]
