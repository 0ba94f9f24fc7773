"""The plotting tool, as a user runs it."""

import pytest

from tests.test_plots import write_run
from tools import plot_run


def test_two_runs_make_a_page(tmp_path, capsys):
    lines = [f'{{"step": {step}, "distill/overlap_ratio": 0.{step}}}' for step in range(1, 9)]
    folders = [write_run(tmp_path / name, lines=lines) for name in ("a", "b")]
    out = tmp_path / "new/out"
    assert plot_run.main([*map(str, folders), "--out", str(out), "--smooth", "3"]) == 0
    *left, page = capsys.readouterr().out.splitlines()
    assert page == str(out / "index.html") and (out / "dynamics.png").exists()
    assert "left out: Entropy gap (Eq. 8): not logged (distill/entropy_gap)" in left
    assert all(line.startswith("left out: ") for line in left)


def test_what_the_user_got_wrong_is_one_line(tmp_path, capsys):
    run, other = write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = ["--out", str(tmp_path / "out")]
    for arguments, told in (
        ([str(tmp_path / "nowhere")], "nowhere': no metrics.jsonl"),
        ([str(tmp_path / "empty")], "empty': no metrics.jsonl"),
        ([str(run), str(other)], "two runs are called 'run'"),
        ([str(run), "--formats", "gif"], "--formats: got 'gif'"),
        ([str(run), "--out", str(tmp_path / "file")], "File exists"),
    ):
        assert plot_run.main([*out, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and told in line
    assert not (tmp_path / "out").exists()


def test_help_says_what_a_run_is(capsys):
    with pytest.raises(SystemExit) as stop:
        plot_run.main(["--help"])
    assert stop.value.code == 0 and "NAME=DIRECTORY" in capsys.readouterr().out
