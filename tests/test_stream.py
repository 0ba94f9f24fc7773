"""Which prompts a step gets: orders, mixes, schedules, and going on where it stopped."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.stream import PromptStream, numbered, steps_per_epoch
from megatron_opd.types import Prompt

SCHEDULES = ("all", "fixed", "one_per_batch", "one_total")


def prompts(*sizes):
    """Sources of that many prompts each, numbered through."""
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        [Prompt(index, (index,), "") for index in range(start, start + size)]
        for start, size in zip(first, sizes, strict=True)
    ]


def drawn(stream, *takes):
    return [[(p.index, p.copy) for p in stream.take(n)] for n in takes]


@st.composite
def streams(draw):
    """A function that makes equal streams, and sizes of steps that they can serve."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    weights = draw(st.none() | st.tuples(*[st.sampled_from([0.1, 0.3, 1.0, 7.0]) for _ in sizes]))
    how = {
        "shuffle": draw(st.booleans()),
        "weights": weights,
        "schedule": draw(st.sampled_from(SCHEDULES)),
    }
    takes = draw(st.lists(st.integers(1, sum(sizes)), max_size=8))
    return lambda: PromptStream(prompts(*sizes), seed=3, **how), takes


@given(made=streams(), cut=st.integers(0, 8))
def test_a_resumed_stream_continues_exactly(made, cut):
    make, takes = made
    expected = drawn(make(), *takes)
    first, second = make(), make()
    seen = drawn(first, *takes[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.epoch == first.epoch
    assert seen + drawn(second, *takes[cut:]) == expected


@given(made=streams())
def test_no_two_prompts_of_a_step_have_the_same_index_and_copy(made):
    make, takes = made
    for step, n in zip(drawn(make(), *takes), takes, strict=True):
        assert len(set(step)) == len(step) == n


@given(size=st.integers(2, 9), step=st.integers(1, 9), shuffle=st.booleans())
def test_a_pass_has_no_prompt_twice_and_leaves_out_less_than_a_step(size, step, shuffle):
    step = min(step, size)
    stream = PromptStream(prompts(size), seed=0, shuffle=shuffle)
    for epoch in range(3):
        once = [p.index for _ in range(size // step) for p in stream.take(step)]
        assert stream.epoch == epoch
        assert len(set(once)) == len(once) > size - step
        assert shuffle or once == sorted(once)


def test_orders_differ_between_epochs_seeds_and_files_and_repeat_for_one_seed():
    def orders(seed):
        stream = PromptStream(prompts(50), seed, shuffle=True)
        return [[p.index for p in stream.take(50)] for _ in range(2)]

    assert orders(1) == orders(1)
    assert len({tuple(order) for order in orders(1) + orders(2)}) == 4
    mixed = PromptStream(prompts(50, 50), 1, shuffle=True, weights=(1, 1)).take(100)
    first, second = ([p.index % 50 for p in mixed if p.index // 50 == i] for i in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


@given(
    weights=st.lists(st.integers(1, 40), min_size=2, max_size=7),
    takes=st.lists(st.integers(1, 20), min_size=1, max_size=12),
)
def test_every_file_has_its_share_within_one_prompt_at_any_time(weights, takes):
    sizes = [20] * len(weights)
    stream = PromptStream(prompts(*sizes), seed=0, weights=weights)
    count: Counter[int] = Counter()
    taken = [prompt.index // 20 for n in takes for prompt in stream.take(n)]
    for total, source in enumerate(taken, start=1):
        count[source] += 1
        for i, weight in enumerate(weights):
            assert abs(count[i] - Fraction(weight * total, sum(weights))) < 1


def test_the_share_holds_where_the_largest_remainder_would_lose_it():
    """By remainders, 3 : 1 : 38 : 38 : 1 : 38 leaves the first list 133/119 prompts behind."""
    weights, count = (3, 1, 38, 38, 1, 38), Counter()
    stream = PromptStream(prompts(*[5] * 6), seed=0, weights=weights)
    worst = Fraction(0)
    for total in range(1, 120):
        (prompt,) = stream.take(1)
        count[prompt.index // 5] += 1
        behind = [abs(Fraction(w * total, 119) - count[i]) for i, w in enumerate(weights)]
        worst = max(worst, *behind)
    assert worst <= 1 - Fraction(1, 10)
    assert [count[i] for i in range(6)] == [*weights]


def test_each_file_of_a_mix_goes_through_passes_of_its_own():
    stream = PromptStream(prompts(3, 100), seed=0, weights=(0.5, 0.5))
    small = [p.index for _ in range(3) for p in stream.take(4) if p.index < 3]
    assert small == [0, 1, 2, 0, 1, 2]
    assert [p.index for p in stream.take(8)][1::2] == [9, 10, 11, 12]


def test_a_file_smaller_than_its_share_is_repeated_in_numbered_copies():
    stream = PromptStream(prompts(2, 9), seed=0, weights=(3, 1))
    (step,) = drawn(stream, 8)
    assert [key for key in step if key[0] < 2] == [(i, copy) for copy in range(3) for i in (0, 1)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("all", [[0, 1], [2, 3], [0, 1]]),  # the fifth does not fill a step
        ("fixed", [[0, 1]] * 3),
        ("one_per_batch", [[0, 0], [1, 1], [2, 2]]),
        ("one_total", [[0, 0]] * 3),
    ],
)
def test_schedules(schedule, expected):
    stream = PromptStream(prompts(5), seed=0, schedule=schedule)
    steps = drawn(stream, 2, 2, 2)
    assert [[index for index, _ in step] for step in steps] == expected
    copies = [0, 1] if schedule.startswith("one") else [0, 0]
    assert all([copy for _, copy in step] == copies for step in steps)


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_shows_once_what_the_schedule_shows(shuffle):
    for schedule, steps in zip(SCHEDULES, (2, 1, 5, 1), strict=True):
        assert steps_per_epoch(schedule, 5, 2) == steps
        stream = PromptStream(prompts(5), seed=0, schedule=schedule, shuffle=shuffle)
        epochs = []
        for _ in range(3 * steps):
            stream.take(2)
            epochs.append(stream.epoch)
        assert epochs == [epoch for epoch in range(3) for _ in range(steps)]


def test_a_fixed_schedule_keeps_the_first_prompts_of_the_shuffled_order():
    first = PromptStream(prompts(50), seed=5, shuffle=True).take(4)
    fixed = PromptStream(prompts(50), seed=5, shuffle=True, schedule="fixed")
    assert fixed.take(4) == fixed.take(4) == first != prompts(50)[0][:4]
    one = PromptStream(prompts(50), seed=5, shuffle=True, schedule="one_total")
    assert {p.index for _ in range(3) for p in one.take(4)} == {first[0].index}


def test_a_fixed_mix_keeps_the_shares():
    stream = PromptStream(prompts(9, 9), seed=0, weights=(3, 1), schedule="fixed")
    assert drawn(stream, 4) == drawn(stream, 4)
    assert sum(p.index < 9 for p in stream.take(8)) == 6


def test_copies_are_counted_over_a_whole_list():
    (three,) = prompts(3)
    assert [p.copy for p in numbered([three[0], three[1], three[0], three[0]])] == [0, 0, 1, 2]


def test_a_stream_over_other_data_is_refused():
    state = PromptStream(prompts(5), seed=0).state_dict()
    with pytest.raises(ValueError, match=r"number of prompts is 6, .* taken with 5"):
        PromptStream(prompts(6), seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 1"):
        PromptStream(prompts(5), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"schedule is fixed, .* taken with all"):
        PromptStream(prompts(5), seed=0, schedule="fixed").load_state_dict(state)
    others = [[replace(prompt, token_ids=(9, 9)) for prompt in prompts(5)[0]]]
    with pytest.raises(ValueError, match="hash of their tokens is"):
        PromptStream(others, seed=0).load_state_dict(state)

    mixed = json.loads(json.dumps(PromptStream(prompts(2, 3), seed=0, weights=(1, 2)).state_dict()))
    with pytest.raises(ValueError, match=r"weights is None, .* taken with \[1, 2\]"):
        PromptStream(prompts(2, 3), seed=0).load_state_dict(mixed)
    with pytest.raises(ValueError, match=r"number of prompts is \[3, 2\], .* with \[2, 3\]"):
        PromptStream(prompts(3, 2), seed=0, weights=(1, 2)).load_state_dict(mixed)
    PromptStream(prompts(2, 3), seed=0, weights=(1, 2)).load_state_dict(mixed)
