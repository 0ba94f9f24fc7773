"""The judging process: any thread may ask, and no expression can hang who asks."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_opd import verifier
from megatron_opd.verifier import Verifier


@pytest.fixture(scope="module")
def judge():
    return Verifier()


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        ("142", "142.0", True),
        (r"\frac12", "0.5", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("(x+1)^2", "x^2+2x+1", True),
        (r"336^\circ", "336", True),
        ("1000", "1,000", True),
        ("1,2", "2,1", True),
        ("(1,2)", "(2,1)", False),
        ("3", "x=3", True),
        ("Yes", r"\text{yes}", True),
        ("Yes", "No", False),
        (r"\infty", r"-\infty", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("3", "\\frac{", False),
        ("3", "\n'\"\\", False),
    ],
)
def test_what_is_the_same(judge, expected, given, same):
    assert judge.same(expected, given) is same


def test_threads_may_ask(judge):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: judge.same("1/2", f"{i}/8"), range(8)))
    assert found == [i == 4 for i in range(8)]


def test_an_expression_without_end_is_wrong_and_the_next_is_judged(caplog):
    brief = Verifier(cpu_seconds=0.5)
    with caplog.at_level(logging.WARNING):
        assert not brief.same("3", "9^{9^{9^9}}")
    (line,) = caplog.messages
    assert line == (
        "reward: comparing '9^{9^{9^9}}' with '3' took more than 0.5 s; counted as wrong"
    )
    assert brief.same("1/2", "2/4")


def test_a_fork_has_a_process_of_its_own():
    """Two that write into one pipe would read each other's answers."""
    assert verifier.same("1/2", "4/8")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, b"1" if verifier.same("1/3", "2/6") else b"0")
        os._exit(0)
    assert os.read(read, 1) == b"1"
    os.waitpid(child, 0)
    assert verifier.same("1/4", "2/8")
