"""What the README says of objectives and metrics is what there is."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_opd.build import build_objective
from megatron_opd.config import Config
from megatron_opd.loss.rules import DIVERGENCES, SUPPORTS
from megatron_opd.loss.weights import WEIGHTS

README = (Path(__file__).parents[2] / "README.md").read_text()
METHODS = re.findall(r"^\| (.+?) \| `(\{.+\})` \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("method", "section"), METHODS, ids=[name for name, _ in METHODS])
def test_a_method_is_a_setting(method, section):
    objective = yaml.safe_load(section)
    config = {
        "student": {"path": "s"},
        "teacher": None if objective.get("divergence") == "cross_entropy" else {"path": "t"},
        "base": {"path": "b"} if "extrapolation" in objective else None,
        "data": {"prompts": ("p",)},
        "objective": objective,
    }
    built = build_objective(Config(**config))
    assert built.support == objective["support"]


def test_every_name_is_in_the_table():
    assert len(METHODS) > 15
    for name in (*SUPPORTS, *DIVERGENCES, *WEIGHTS):
        assert f"`{name}`" in README, name
