"""Every probe end to end on tiny models, and what the user got wrong."""

import contextlib
import io
import json

import pytest

from tests.distributed import run_ranks
from tests.probes.home import OVERRIDES, make_models, read
from tools import probe


def _run(rank, folder, words):
    """Return the exit code and what was said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = probe.main(words)
    return code, out.getvalue(), err.getvalue()


def run(folder, name, *words):
    (told,) = run_ranks(_run, 1, folder, [name, "config.yaml", *OVERRIDES, *words])
    return told


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(
    ("name", "words", "shown"),
    [
        ("reward-auroc", (), "AUROC"),
        ("continuation", ("--lengths", "0", "3"), "teacher goes on"),
        ("length", ("--lengths", "4", "12"), "rollout.max_tokens=12 run.dir=runs/length_12"),
        (
            "coherence",
            ("--tokens", "60", "--supports", "sampled", "full"),
            "objective and sampled",
        ),
    ],
)
def test_a_probe_leaves_figures_and_a_picture_and_shows_a_table(home, name, words, shown):
    overrides = ["train.prompts_per_step=10", "train.microbatch_tokens=150"]
    code, out, err = run(home, name, *overrides, *words, "--out", f"probes/{name}")
    assert (code, err) == (0, "") and shown in out
    folder = home / "probes" / name
    assert f"probes/{name}/{name}.json" in out
    figures = json.loads((folder / f"{name}.json").read_text())
    assert figures["probe"] == name and figures["words"][0] == "config.yaml"
    assert figures.get("responses") == 30
    assert (folder / f"{name}.png").read_bytes()[1:4] == b"PNG"
    if name == "coherence":
        _check_coherence(figures)


def _check_coherence(figures):
    layers = [f"block {n} {part}" for n in range(1, 5) for part in ("attention", "mlp")]
    for by_layer in figures["by_objective"].values():
        assert list(by_layer) == [*layers, "head"]
    head = figures["by_objective"]["objective"]["head"]["sets"]["all"]
    assert head["tokens"] == 60 == figures["sampled"]["all"] and head["prompts"] == 10
    assert set(head["cosine"]) == {"value", "low", "high"}
    # the sampled token's gradient is the whole vocabulary's on average, not token by token
    between = figures["between_objectives"]
    exact, drawn = (between[f"{one} and full"]["head"] for one in ("objective", "sampled"))
    assert drawn["cosine"] < exact["cosine"] <= 1


def test_what_the_user_got_wrong_is_one_line(home, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    new = ("--out", "none")
    for words, told in (
        (("reward-auroc", "--out", str(tmp_path / "full")), "--out: '"),
        (("continuation", "--lengths", "-1", *new), "--lengths: got -1, expected 0 or more"),
        (("length", "--lengths", "0", *new), "--lengths: got 0, expected 1 or more"),
        (("coherence", "--tokens", "1", *new), "--tokens: got 1, expected 2 or more"),
        (("length", "parallel.tp=2", *new), "parallel: got tp=2 on 1 ranks, expected one"),
        (("length", "parallel.cp=2", *new), "parallel: got cp=2 on 1 ranks, expected one"),
        (("length", "teacher.parallel.tp=1", *new), "teacher.parallel: set, but here both models"),
        (
            ("length", "rollout.engine=vllm", *new),
            "rollout.engine: got 'vllm', expected megatron",
        ),
        (("length", "rollout.lenght=3", *new), "rollout.lenght: no such key"),
        (("coherence", "eval.reward=other", *new), "eval.reward: got 'other'"),
    ):
        code, _, err = run(home, *words)
        (line,) = err.splitlines()
        assert code == 2 and line.startswith(f"error: {told}"), line
    assert not (home / "none").exists()


def test_prompts_without_answers_cannot_be_verified(tmp_path):
    make_models(tmp_path, answers=False)
    code, _, err = run(tmp_path, "length", "--out", "none")
    assert code == 2 and "has no answer, with which eval.reward=" in err
    assert len(err.splitlines()) == 1
    assert read(tmp_path).teacher is not None
