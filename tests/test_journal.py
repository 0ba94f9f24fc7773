"""Files that are cut off anywhere go on as if they had never been."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_opd.journal import Journal, read_lines


def write(folder, until: int) -> None:
    """Do the work from where it stands: rounds of a line in one file, and of some in another."""
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    journal = Journal(folder / "state.json", files, {"seed": 1})
    for number in range(journal.done, until):
        rows = {"a.jsonl": [{"n": number, "text": "ü\u2028"}], "b.jsonl": [{"n": number}] * number}
        journal.append(rows, number + 1)


@given(done=st.integers(0, 5), cut=st.integers(1, 200))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None
)
def test_a_kill_changes_nothing(tmp_path_factory, done, cut):
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    write(whole, 6)
    write(killed, done)
    for name in ("a.jsonl", "b.jsonl"):  # what was written after the last note
        have = len((killed / name).read_bytes())
        (killed / name).write_bytes((whole / name).read_bytes()[: have + cut])
    write(killed, 6)
    for name in ("a.jsonl", "b.jsonl", "state.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert [row["n"] for row in read_lines(whole / "a.jsonl")] == list(range(6))


def test_what_does_not_belong_together_is_refused(tmp_path):
    write(tmp_path, 3)
    files, state = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "state.json"
    with pytest.raises(ValueError, match=r"was begun with seed=1, got 2; go on with the same"):
        Journal(state, files, {"seed": 2})
    with pytest.raises(ValueError, match=r"was begun with n=None, got 4"):
        Journal(state, files, {"seed": 1, "n": 4})
    files[0].write_text("{}\n")
    with pytest.raises(ValueError, match=r"a.jsonl' is shorter than the \d+ bytes"):
        Journal(state, files, {"seed": 1})
    state.unlink()
    with pytest.raises(ValueError, match=r"a.jsonl' exists, and '.*state.json'"):
        Journal(state, files, {"seed": 1})


def test_the_state_is_readable(tmp_path):
    write(tmp_path, 2)
    size = (tmp_path / "b.jsonl").stat().st_size
    kept = json.loads((tmp_path / "state.json").read_text())
    assert (
        kept["done"] == 2 and kept["settings"] == {"seed": 1} and kept["bytes"]["b.jsonl"] == size
    )
