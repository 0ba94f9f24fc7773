"""Going on from a prefix: the ids that were drawn, and a teacher that adds nothing of its own."""

import pytest

from megatron_opd import parallel as mesh
from megatron_opd.probes import continuation
from megatron_opd.probes.pair import Pair
from tests.distributed import run_ranks
from tests.probes.home import make_models, read


def _goes_on(rank, folder):
    """Return responses, and what the student writes after their first 4 tokens by the same dice."""
    pair = Pair(read(folder), mesh.initialize())
    written = pair.write("student", pair.prompts, n=1)
    cut = [rollout for rollout in written if len(rollout.response_ids) > 4]
    prefixes = [continuation.prefix(rollout, rollout.prompt.index, 4) for rollout in cut]
    return cut, pair.write("student", prefixes, n=1, shorter=4)


def test_a_prefix_is_prompt_and_ids_and_goes_on_as_if_it_were_never_cut(tmp_path):
    ((cut, goes_on),) = run_ranks(_goes_on, 1, make_models(tmp_path))
    assert len(cut) > 2
    for rollout, rest in zip(cut, goes_on, strict=True):
        assert rest.prompt.token_ids == rollout.prompt.token_ids + rollout.response_ids[:4]
        assert rest.response_ids == rollout.response_ids[4:] and rest.finish == rollout.finish


def _found(rank, folder, lengths):
    return continuation.probe(Pair(read(folder), mesh.initialize()), lengths)


def test_a_teacher_that_is_the_student_has_no_advantage(tmp_path):
    (found,) = run_ranks(_found, 1, make_models(tmp_path, same=True), None)
    lengths = [row["length"] for row in found["by_length"]]
    assert len(lengths) == 4 and lengths[0] == 0 and lengths == sorted(set(lengths))
    for row in found["by_length"]:  # both throw the same dice
        assert row["advantage"] == (0, 0, 0) and row["teacher"] == row["student"]
    assert 0 < found["by_length"][0]["student"].value < 1


def test_two_models_differ_and_a_prefix_that_nobody_has_written_is_told(tmp_path):
    folder = make_models(tmp_path)
    (found,) = run_ranks(_found, 1, folder, [2, 0, 2])
    assert [row["length"] for row in found["by_length"]] == [0, 2]
    advantages = [row["advantage"].value for row in found["by_length"]]
    assert any(advantages) and 0 < found["cut"] <= found["responses"] == 12
    for row in found["by_length"]:
        difference = row["teacher"].value - row["student"].value
        assert row["advantage"].value == pytest.approx(difference)
    with pytest.raises(RuntimeError, match="ValueError: --lengths: got 99, expected less than 12"):
        run_ranks(_found, 1, folder, [99])
