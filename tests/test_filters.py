"""Which responses are rejected: the rules of the cold start, to the character."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.filters import FILTERS, build_filters, reasons
from megatron_opd.types import Prompt, Rollout


def rollout(finish="stop", reward=None) -> Rollout:
    return Rollout(Prompt(0, (1,), ""), 0, (1,), (0.0,), finish, reward=reward)


def rejected(text, *names, of=None, **options) -> tuple[str, ...]:
    return reasons(build_filters(dict.fromkeys(names or FILTERS, options)), text, of or rollout())


def distinct(length: int) -> str:
    """A text in which hardly anything is there twice."""
    return "".join(f"{i * i % 9973:x}," for i in range(length))[:length]


def test_a_response_may_have_several_faults():
    assert rejected(r"\boxed{1}") == ()
    assert rejected("1", of=rollout("length", 0.0)) == ("truncated", "no_box", "wrong")
    assert rejected(r"\boxed{1}", of=rollout(reward=1.0)) == ()
    assert rejected(" \n", "truncated", "empty") == ("empty",)
    assert rejected("", "wrong", of=rollout(reward=0.4), above=0.3) == ()


def test_lines_that_come_back():
    line = "x" * 20
    for text, found in [
        (f"{line}\n" * 5, True),
        (f"{line}\n" * 4, False),
        (f"{line[1:]}\n" * 9, False),
        (f"  {line}\n\nother\n" * 5, True),
    ]:
        assert (rejected(text, "repeated_lines") == ("repeated_lines",)) is found
    assert rejected(f"{line}\n" * 2, "repeated_lines", times=2, length=3) == ("repeated_lines",)


def test_windows_that_come_back():
    part, apart = distinct(100), distinct(3000)[500:]
    for text, found in [
        (part + apart[:300] + part + apart[300:600] + part, True),
        (part + apart[:300] + part, False),
        (part + apart[:303] + part + apart[303:600] + part, False),  # not on the stride of 10
        (apart, False),
        ("a" * 120, True),
        ("a" * 119, False),
    ]:
        assert (rejected(text, "repeated_windows") == ("repeated_windows",)) is found


@pytest.mark.parametrize("start", [0, 7, 4999])
def test_blocks_in_a_row(start):
    text, block = distinct(5100), "é" + distinct(49)
    for times, found in ((2, False), (3, True)):
        looped = text[:start] + block * times + text[start:]
        assert (rejected(looped, "repeated_blocks") == ("repeated_blocks",)) is found
    assert rejected(block * 100, "repeated_blocks") == ()  # 5,000 characters are not more
    assert rejected(block * 100 + "x", "repeated_blocks") == ("repeated_blocks",)


@given(st.text("ab", max_size=40), st.integers(1, 4), st.integers(2, 4))
def test_blocks_are_what_a_search_finds(text, length, times):
    starts = range(len(text) - length * times + 1)
    blocks = [text[start : start + length] for start in starts]
    found = any(
        text[start : start + length * times] == block * times
        for start, block in zip(starts, blocks, strict=True)
    )
    options = {"length": length, "times": times, "longer_than": 1}
    assert bool(rejected(text, "repeated_blocks", **options)) is (found and len(text) > 1)


def test_a_long_text_takes_no_time():
    start = time.process_time()
    assert len(rejected(distinct(500_000))) == 2  # 45k tokens: its windows come back, and no box
    assert time.process_time() - start < 2


def test_wrong_names_and_options_are_told():
    for asked, told in [
        ({"boring": {}}, "got 'boring', expected one of truncated, empty, no_box"),
        ({"truncated": {"n": 1}}, "filter truncated.n: no such option; it has no options"),
        ({"repeated_lines": {"n": 1}}, "its options are length, times"),
        ({"repeated_lines": {"times": 0}}, "got 0, expected a whole number > 0"),
        ({"repeated_lines": {"times": 1.5}}, "got 1.5, expected a whole number > 0"),
    ]:
        with pytest.raises(ValueError) as error:
            build_filters(asked)
        assert told in str(error.value)
