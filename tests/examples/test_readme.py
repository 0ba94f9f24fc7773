"""What the README says of objectives and metrics is what there is."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_opd import schedule
from megatron_opd.build import build_objective
from megatron_opd.config import Config
from megatron_opd.loss.names import DIVERGENCES, SUPPORTS
from megatron_opd.loss.weights import CORRECTIONS, WEIGHTS

README = (Path(__file__).parents[2] / "README.md").read_text()
OBJECTIVE, OTHERS = r"`(\{[^`]+\})`", r"((?:, `\w+: \{[^`]+\}`)*)"
METHODS = re.findall(rf"^\| (.+?) \| {OBJECTIVE}{OTHERS} \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("method", "section", "others"), METHODS, ids=[row[0] for row in METHODS])
def test_a_method_is_a_setting(method, section, others):
    config = {
        "student": {"path": "s"},
        "teacher": {"path": "t"},
        "data": {"prompts": ("p",)},
        "rollout": {},
        "objective": yaml.safe_load(section),
    }
    for key, more in yaml.safe_load(f"{{{others.replace('`', '').lstrip(', ')}}}").items():
        config[key] = config.get(key, {}) | more
    built, *terms = (
        term for end in schedule.ends(Config(**config)) for term in build_objective(end).terms
    )
    assert built.support == config["objective"]["support"]
    assert built.correction == config["rollout"].get("correction", "none")
    assert set(config.get("terms", {})) == {term.name for term in terms} - {"objective"}


def test_every_name_is_in_the_table():
    assert len(METHODS) > 15
    for name in (*SUPPORTS, *DIVERGENCES, *WEIGHTS, *CORRECTIONS):
        assert f"`{name}`" in README, name
