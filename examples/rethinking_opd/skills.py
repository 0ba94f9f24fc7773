"""What the miniatures learn: sums with the work shown in one of two orders, and other skills.

    347+285=      right   7+5=12,4+8+1=13,3+2+1=6;632     columns from the right, with carries
                  left    3+2=5,4+8=12,7+5=12;632         from the left, carried at the end
    add 347 285:          the same sums in another template
    341+248=              sums without a carry ("plain")
    347-285=      right   7-5=2,4-8=-4,3-2-1=0;62         differences: another skill
    xkq?                  bav                             facts: nothing but memory

The two orders are two ways of thinking about one task: alike in alphabet and length, and their
answers are graded alike. A row has the response of each order in a column of that name.
"""

import json
import random
import string
from pathlib import Path

from examples.quickstart.task import question_and_answer
from megatron_opd.types import Prompt

ROWS = {"sums": 18_000, "cold": 2_000, "differences": 18_000, "words": 18_000, "plain": 18_000}
FACTS = 100
HELD_OUT = 256
TEACHER_SHARE = 0.3  # of the mixture of facts and sums


def right_answer(response: str, prompt: Prompt) -> float:
    """Return 1.0 when what follows the work is the answer, whatever the order of the work."""
    return float(response.strip().rpartition(";")[2] == prompt.answer)


def from_the_left(prompt: str, response: str) -> bool:
    """Say whether the work on a sum starts with the first digits of both numbers."""
    one, other = prompt.rstrip("=").split("+")
    return response.startswith(f"{one[0]}+{other[0]}=")


def addition(a: int, b: int) -> dict[str, str]:
    """Return the row of a + b, both of the same number of digits."""
    prompt, right = question_and_answer(a, b)
    columns = zip(str(a), str(b), strict=True)
    work = ",".join(f"{x}+{y}={int(x) + int(y)}" for x, y in columns)
    return {"prompt": prompt, "answer": f"{a + b}", "right": right, "left": f"{work};{a + b}"}


def subtraction(a: int, b: int) -> dict[str, str]:
    """Return the row of the larger minus the smaller, both of the same number of digits."""
    high, low, borrowed, work = max(a, b), min(a, b), False, []
    for x, y in zip(str(high)[::-1], str(low)[::-1], strict=True):
        rest = int(x) - int(y) - borrowed
        work.append(f"{x}-{y}{'-1' * borrowed}={rest}")
        borrowed = rest < 0
    answer = f"{high - low}"
    return {"prompt": f"{high}-{low}=", "answer": answer, "right": f"{','.join(work)};{answer}"}


def in_words(a: int, b: int) -> dict[str, str]:
    """Return the row of a + b in the other template."""
    return {**addition(a, b), "prompt": f"add {a} {b}:"}


def write_data(folder: Path, seed: int) -> None:
    """Write every file of prompts; no sum is in two of sums, cold and the held-out test/sums."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    pairs = _pairs(draw, HELD_OUT + ROWS["sums"] + ROWS["cold"])
    held_out, seen, cold = pairs[:HELD_OUT], pairs[HELD_OUT:], pairs[HELD_OUT + ROWS["sums"] :]
    for name, row in {"sums": addition, "words": in_words, "differences": subtraction}.items():
        _write(folder / f"test/{name}.jsonl", [row(*pair) for pair in held_out])
        _write(folder / f"{name}.jsonl", [row(*pair) for pair in seen[: ROWS[name]]])
    _write(folder / "cold.jsonl", [addition(*pair) for pair in cold])
    plain = _plain_pairs(random.Random(f"plain {seed}"), HELD_OUT + ROWS["plain"])
    _write(folder / "test/plain.jsonl", [addition(*pair) for pair in plain[:HELD_OUT]])
    _write(folder / "plain.jsonl", [addition(*pair) for pair in plain[HELD_OUT:]])
    facts = _facts(draw)
    _write(folder / "facts.jsonl", facts)
    _write(folder / "test/facts.jsonl", facts)  # what was read is what is asked
    chat = [addition(*pair) for pair in seen[:2000]]
    many = round(len(chat) * (1 - TEACHER_SHARE) / TEACHER_SHARE)
    _write(folder / "facts_and_sums.jsonl", chat + [facts[i % len(facts)] for i in range(many)])


def _pairs(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """Return different pairs of three-digit numbers."""
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        pairs[draw.randrange(100, 1000), draw.randrange(100, 1000)] = None
    return list(pairs)


def _plain_pairs(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """Return different pairs without a carry: no column adds up to ten."""
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        a, b = draw.randrange(100, 1000), draw.randrange(100, 1000)
        if all(int(x) + int(y) < 10 for x, y in zip(str(a), str(b), strict=True)):
            pairs[a, b] = None
    return list(pairs)


def _facts(draw: random.Random) -> list[dict[str, str]]:
    names: dict[str, None] = {}
    while len(names) < 2 * FACTS:
        names["".join(draw.choices(string.ascii_lowercase, k=3))] = None
    listed = list(names)
    pairs = zip(listed[::2], listed[1::2], strict=True)
    return [{"prompt": f"{name}?", "answer": fact, "right": fact} for name, fact in pairs]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
