"""A mix of the dataset's responses and drawn ones: who answers what does not depend on batches."""

from dataclasses import replace

import pytest

from megatron_opd.rollout import Sampling
from megatron_opd.rollout.mixed import MixedEngine
from megatron_opd.rollout.replay import ReplayEngine
from megatron_opd.types import Prompt

SAMPLING = Sampling(max_tokens=8)


class Counting(ReplayEngine):
    """An engine that draws: every sample is its own number."""

    def generate(self, prompts, *, n, sampling, seed):
        once = super().generate(prompts, n=1, sampling=sampling, seed=seed)
        return [
            replace(r, sample=sample, response_ids=(sample + 1,), logp=(-1.0,), drawn=True)
            for r in once
            for sample in range(n)
        ]


def _mixed(fraction, by="prompt"):
    drawing, dataset = Counting(_encode), ReplayEngine(_encode)
    return MixedEngine(drawing, dataset, fraction=fraction, by=by)


def _encode(text):
    return tuple(map(ord, text))


def _prompts(count):
    return [Prompt(i, (5, i), f"p{i}", response=f"r{i % 10}") for i in range(count)]


def _answer(engine, prompts, seed=3):
    return engine.generate(prompts, n=2, sampling=SAMPLING, seed=seed)


def test_every_prompt_is_answered_by_one_of_both_in_order():
    rollouts = _answer(_mixed(0.5), _prompts(200))
    assert [r.prompt.index for r in rollouts] == sorted(r.prompt.index for r in rollouts)
    given = [r for r in rollouts if not r.drawn]
    drawn = [r for r in rollouts if r.drawn]
    assert all(r.response_ids == _encode(r.prompt.response) for r in given)
    assert [r.sample for r in drawn] == [0, 1] * (len(drawn) // 2)
    assert len(given) + len(drawn) // 2 == 200
    assert {r.prompt.index for r in given}.isdisjoint(r.prompt.index for r in drawn)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.7, 1.0])
def test_the_share_is_the_fraction(fraction):
    rollouts = _answer(_mixed(fraction), _prompts(4000))
    share = sum(not r.drawn for r in rollouts) / 4000
    # four standard deviations of a binomial; exact at the ends
    assert abs(share - fraction) <= 4 * (fraction * (1 - fraction) / 4000) ** 0.5


def test_a_prompt_has_its_own_coin_whatever_is_asked_with_it():
    engine, prompts = _mixed(0.5), _prompts(64)
    together = _answer(engine, prompts)
    apart = _answer(engine, prompts[::2]) + _answer(engine, prompts[1::2])
    assert sorted(apart, key=lambda r: r.prompt.index) == together
    assert {r.prompt.index for r in together if r.drawn} != {
        r.prompt.index for r in _answer(engine, prompts, seed=4) if r.drawn
    }


def test_copies_of_a_prompt_have_coins_of_their_own():
    copies = [replace(_prompts(1)[0], copy=copy) for copy in range(64)]
    drawn = {r.drawn for r in _answer(_mixed(0.5), copies)}
    assert drawn == {True, False}


def test_one_coin_a_step():
    steps = [{r.drawn for r in _answer(_mixed(0.5, "step"), _prompts(8), s)} for s in range(40)]
    assert all(len(kinds) == 1 for kinds in steps)
    assert 8 <= sum(kinds == {True} for kinds in steps) <= 32
