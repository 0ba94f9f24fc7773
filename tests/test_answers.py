"""The answer in a response: found where it is, whatever stands around it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.answers import boxed, canonical, stated


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} or \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} \text{m}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"}}{ \boxed{7}", "7"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{", None),
        (r"\boxed{ }", None),
        (r"\boxed{{}}.", "{}"),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box_that_closes(text, answer):
    assert boxed(text) == answer


balanced = st.recursive(
    st.text("ab1 \\,", max_size=4).filter(lambda s: not s.endswith("\\")),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=8,
)


@given(st.text("ab}{ \\"), balanced, st.text("ab ", max_size=9))
def test_a_balanced_box_is_found_after_anything(before, content, after):
    before += " " if before.endswith("\\") else ""
    assert boxed(f"{before}\\boxed{{{content}}}{after}") == (content.strip() or None)


def test_boxes_that_never_close_take_no_longer_than_a_text():
    start = time.process_time()
    assert boxed("\\boxed{" * 100_000) is None
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("thus\nAnswer: 5\n\n", "5"),
        ("Answer: $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("**Answer:** 5", "5"),
        ("**Answer: 5**", "5"),
        ("answer: \\boxed{5}.", "5"),
        ("Answer: 5\nor not", None),
        ("Answer:", None),
        ("The answer: 5", None),
        ("", None),
    ],
)
def test_the_answer_of_the_last_line(text, answer):
    assert stated(text) == answer


def test_one_canonical_form_for_what_only_looks_different():
    for forms in (
        ("142", "142.0", " 142 ", "+142", "0142", "142.", "$142$", "142.00"),
        ("0", "-0", "0.0", "-0.00", ".0"),
        ("0.5", ".5", "0.50", "00.5"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac {1}{2}"),
        ("(1,2)", r"\left( 1, 2 \right)", r"(1,\,2)"),
        ("22099999999999998951424", "22099999999999998951424.0"),
    ):
        assert {canonical(form) for form in forms} == {forms[0]}
    for one, other in (("2 1/2", "21/2"), (r"\leftarrow", "arrow"), ("1", "-1"), ("1e5", "15")):
        assert canonical(one) != canonical(other)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_numbers_keep_their_value(number):
    form = canonical(f"{number:f}")
    assert float(form) == float(number) and canonical(form) == form
