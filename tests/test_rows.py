"""What a prompt file says, and the one line that names what is wrong with it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_opd.config import Data
from megatron_opd.rows import Row, check_ids, read_rows, write_rows
from tests.prompts import write

DATA = Path(__file__).parents[2] / "shared" / "data"


def read(file, teachers=None, **changes):
    data = Data(prompts=(file,), **changes)
    rows = read_rows(data, file, teachers=teachers)
    check_ids(data, rows)
    return rows


def refusal(file, **how):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as raised:
        read(str(file), **how)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_keys_enter_nested_columns(tmp_path):
    row = {"extra": {"q": "hello", "a": 7, "score": True}, "gold.text": "fine", "by": "math"}
    (found,) = read(
        write(tmp_path / "a.jsonl", [row]),
        prompt_key="extra.q",
        answer_key="extra.a",
        response_key="gold.text",
        reward_key="extra.score",
        teacher_key="by",
        id_key="extra.a",
    )
    assert found.messages == [{"role": "user", "content": "hello"}]
    assert (found.answer, found.response, found.reward) == ("7", "fine", 1.0)
    assert (found.id, found.teacher, found.source) == ("7", "math", "a")


def test_what_a_row_does_not_say_is_nothing(tmp_path):
    (found,) = read(write(tmp_path / "a.jsonl", [{"prompt": "q", "reward": None}]))
    assert (found.answer, found.response, found.reward, found.id) == (None,) * 4
    assert found.teacher == ""


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("absent.jsonl", None, "no such file"),
        ("a.csv", "q", "expected a .parquet or .jsonl file"),
        ("empty.jsonl", "", "empty, expected at least one row"),
        ("a.parquet", "no parquet", "not a parquet file"),
        ("a.jsonl", '{"prompt": "q"}\n{"prompt"', "row 1: not JSON"),
        ("a.jsonl", '{"prompt": "q"}\n\n', "row 1: not JSON"),
        ("a.jsonl", '"q"\n', "row 0: expected an object"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "row 0: not UTF-8 text"),
        ("a.jsonl", '{"question": "q"}\n', "row 0: data.prompt_key='prompt' gives 'None'"),
        ("a.jsonl", '{"question": "q"}\n', "columns: question"),
        ("a.jsonl", '{"prompt": [{"role": "user"}]}\n', "expected a string or a list of {role"),
        ("a.jsonl", '{"messages": []}\n', "row 0: no message that the student could"),
        ("a.jsonl", '{"prompt": "q", "response": ["r"]}\n', "gives \"['r']\", expected text"),
        ("a.jsonl", '{"prompt": "q", "answer": NaN}\n', "gives 'nan', expected text or a number"),
        ("a.jsonl", '{"prompt": "q", "reward": NaN}\n', "gives 'nan', expected a finite number"),
        ("a.jsonl", '{"prompt": "q", "reward": "1"}\n', "gives '1', expected a finite number"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, line):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    answer = refusal(tmp_path / name)
    assert line in answer and name in answer


def test_a_conversation_that_ends_before_it_begins_is_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "hi"}]}])
    assert "a.jsonl, row 0: no message that the student could answer" in refusal(file)


def test_one_wrong_row_of_many_is_named(tmp_path):
    rows = [{"prompt": f"what is {i} + 1?", "reward": 0.5} for i in range(13_000)]
    lines = [json.dumps(row) for row in rows]
    file = tmp_path / "a.jsonl"
    for wrong in (7, ["q"], [{"role": "user", "content": None}], {"role": "user"}):
        lines[12_345] = json.dumps({"prompt": wrong})
        file.write_text("\n".join(lines))
        assert f"{file}, row 12345: data.prompt_key='prompt' gives" in refusal(file)
    rows[12_345]["reward"] = float("nan")  # as pandas writes what is missing
    table = write(tmp_path / "nan.parquet", rows)
    line = refusal(table)
    assert line.startswith(f"{table}, row 12345: data.reward_key='reward' gives 'nan', expected")
    assert "nothing (null) where nobody scored" in line


def test_a_parquet_file_that_was_cut_or_damaged_is_refused(tmp_path):
    rows = [{"prompt": f"what is {i} + 1?" * 9, "id": str(i)} for i in range(500)]
    file = Path(write(tmp_path / "a.parquet", rows))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "a.parquet: not a parquet file, or not a whole one; write or copy" in refusal(file)
    file.write_bytes(whole[:64] + bytes(len(whole) // 2) + whole[64 + len(whole) // 2 :])
    assert "a.parquet: not a parquet file, or not a whole one; write or copy" in refusal(file)


def test_an_empty_table_is_refused(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "a.parquet: empty, expected at least one row" in refusal(tmp_path / "a.parquet")


def test_ids_that_repeat_name_both_rows_and_the_ways_out(tmp_path):
    rows = [{"prompt": "q", "id": i} for i in ("a", "b", None, None, "b")]
    file = write(tmp_path / "a.jsonl", rows)
    line = refusal(file)
    assert line.startswith(f"{file}, row 4: its id 'b' (data.id_key='id', else")
    assert "is that of row 1; drop" in line and "data.id_key=null" in line
    assert len(read(file, id_key=None)) == len(read(file, id_key="uid")) == 5
    nested = [{"prompt": "q", "extra_info": {"index": i}} for i in (3, 3)]
    assert "row 1: its id '3'" in refusal(write(tmp_path / "n.parquet", nested))


def test_teachers_are_checked_by_name(tmp_path):
    rows = [{"prompt": "q", "teacher": name} for name in ("math", None, "maths")]
    file = write(tmp_path / "a.jsonl", rows)
    assert [row.teacher for row in read(file)] == ["math", "", "maths"]
    line = refusal(file, teachers=("math", "code"))
    assert line == f"{file}, row 2: data.teacher_key='teacher' gives 'maths', expected one of " + (
        "math, code"
    )


@pytest.mark.parametrize("optional", [False, True])
def test_rows_that_are_written_read_the_same(tmp_path, optional):
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "1+1?"}]
    more = {"response": "2", "reward": 0.0, "teacher": "math"}
    none = {"response": None, "reward": None, "teacher": ""}
    row = Row("x", "s", messages, "2", id="7", ability="math", **(more if optional else none))
    other = Row("x", "s", messages[1:], None, id=None, ability=None, **none)
    write_rows(tmp_path / "a.parquet", [row, other])
    again = read(str(tmp_path / "a.parquet"))
    names = [name for name in vars(row) if name != "where"]
    for before, after in zip((row, other), again, strict=True):
        assert [getattr(before, n) for n in names] == [getattr(after, n) for n in names]
    columns = pq.read_schema(tmp_path / "a.parquet").names
    wanted = ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert columns == wanted + ["response", "reward", "teacher"] * optional
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.skipif(not DATA.exists(), reason="the real prompts are not beside the repository")
def test_the_published_files_load_with_their_ids():
    sizes = {"aime24": 30, "aime25": 30, "amc23": 83, "deepmath-deduped": 14116}
    for name, size in sizes.items():
        rows = read(str(DATA / f"{name}.parquet"))
        assert len(rows) == size == len({row.id for row in rows})
        assert all(row.answer is not None and row.reward is None for row in rows)
