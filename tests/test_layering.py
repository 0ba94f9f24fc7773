"""Who may import whom, read from the source: a rule that nobody has to remember."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part (module or package) may import only these of ours. Parts that are not listed put others
# together, and may import what they like, except `train`.
MAY_IMPORT = {
    "types": set(),
    "signs": set(),
    "watch": {"signs"},
    "config": {"config_rules"},
    "config_rules": {"config"},
    "platform": set(),
    "config_file": {"config"},
    "parallel": {"platform"},
    "rows": set(),
    "templates": set(),
    "stream": {"types"},
    "context": {"rows", "templates"},
    "data": {"context", "rows", "templates", "types"},
    "vocabulary": set(),
    "dedup": {"templates"},
    "packing": {"types"},
    "zigzag": {"types"},
    "balance": {"packing", "parallel", "types"},
    "cost": {"config", "loss", "model", "planner", "types"},
    "advantage": {"types"},
    "schedule": {"config"},
    "answers": set(),
    "verifier": set(),
    "reward": {"answers", "types", "verifier"},
    "filters": {"advantage", "answers", "types"},
    "evaluation": {"advantage", "answers", "parallel", "reward", "rollout", "types"},
    "journal": {"parallel"},
    "metrics": {"types"},
    "plots": set(),
    "loss": {"types"},
    "offload": set(),
    "model": {"parallel", "platform", "types", "zigzag"},
    "memory": {"config", "loss", "model", "parallel"},
    "planner": {
        "build",
        "config",
        "config_file",
        "loss",
        "memory",
        "model",
        "parallel",
        "preflight",
        "tables",
        "teacher",
    },
    # rollout: the client of a server, which writes for one and judges for the other
    "teacher": {
        "config",
        "loss",
        "model",
        "offload",
        "parallel",
        "platform",
        "rollout",
        "types",
        "zigzag",
    },
    "rollout": {"config", "model", "parallel", "platform", "types"},
    "judging": {"step", "teacher", "types"},
    "step": {"config", "loss", "metrics", "model", "offload", "parallel", "platform", "types"},
    "told": {"types"},
    "transcript": {"types"},
    "bench": {
        "build",
        "config",
        "loss",
        "model",
        "packing",
        "parallel",
        "rollout",
        "teacher",
        "told",
        "types",
    },
    "doctor": {
        "answers",
        "bench",
        "build",
        "config",
        "data",
        "evaluation",
        "inputs",
        "loss",
        "memory",
        "parallel",
        "preflight",
        "probes",
        "rollout",
        "rows",
        "signs",
        "templates",
        "told",
        "types",
        "vocabulary",
    },
    "probes": {
        "bench",
        "build",
        "config",
        "evaluation",
        "inputs",
        "loss",
        "model",
        "parallel",
        "plots",
        "preflight",
        "rollout",
        "told",
        "types",
    },
}
# A dependency may be imported only in modules whose name starts so.
QUARANTINE = {
    "megatron": (
        "platform",
        "parallel",
        "model.",
        "step",
        "checkpoint",
        "teacher.",
        "rollout.megatron",
    ),
    "vllm": ("rollout.vllm", "tools.benchmark_rollout"),
    "wandb": ("metrics",),
    "torch.utils.tensorboard": ("metrics",),
    "tensorboard": ("metrics",),
    "math_verify": ("verifier",),
    "sentence_transformers": ("dedup",),
    "faiss": ("dedup",),
    "transformer_engine": ("platform", "model."),
}


def violations(sources: dict[str, str]) -> list[str]:
    """Return one line for every import that breaks a rule; `sources`: module name → source text."""
    found = []
    for module, source in sorted(sources.items()):
        inside = module.startswith("megatron_opd.")
        name = module.removeprefix("megatron_opd.")
        part = name.split(".")[0]
        for target in sorted(imports(source, module)):
            if target.startswith("megatron_opd."):
                other = target.split(".")[1]
                allowed = MAY_IMPORT.get(part) if inside else None
                if other != part and allowed is not None and other not in allowed:
                    found.append(f"{module} imports {target}")
                if other == "train" and name != "__main__":
                    found.append(f"{module} imports train")
            for dependency, places in QUARANTINE.items():
                ours = any(f"{name}.".startswith(place) for place in places)
                if f"{target}.".startswith(f"{dependency}.") and not ours:
                    found.append(f"{module} imports {dependency}")
    return found


def imports(source: str, module: str) -> set[str]:
    """Return the dotted names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def read_sources() -> dict[str, str]:
    files = [
        file for top in ("megatron_opd", "tools", "examples") for file in (ROOT / top).rglob("*.py")
    ]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in files
    }


def test_the_package_keeps_its_layers():
    sources = read_sources()
    assert "megatron_opd.config" in sources
    assert violations(sources) == []


def test_every_rule_is_about_a_part_that_exists():
    parts = {name.split(".")[1] for name in read_sources() if name.startswith("megatron_opd.")}
    named = set(MAY_IMPORT) | {other for allowed in MAY_IMPORT.values() for other in allowed}
    assert named <= parts


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("loss.kl", "from megatron_opd.parallel import Parallel", "imports megatron_opd.parallel"),
        ("data", "def f():\n    from megatron_opd import config", "imports megatron_opd.config"),
        ("types", "import megatron_opd.loss.kl", "imports megatron_opd.loss.kl"),
        ("model.spec", "from ..rollout import replay", "imports megatron_opd.rollout.replay"),
        ("job", "from megatron_opd import train", "imports train"),
        ("job", "from megatron_opd.train import main", "imports train"),
        ("job", "from megatron.core import parallel_state", "imports megatron"),
        ("rollout.replay", "import megatron.core", "imports megatron"),
        ("job", "import wandb", "imports wandb"),
        ("job", "from torch.utils.tensorboard import SummaryWriter", "imports torch.utils"),
        ("job", "def f():\n    import vllm.engine", "imports vllm"),
    ],
)
def test_a_violation_is_found(module, source, line):
    (found,) = violations({f"megatron_opd.{module}": source})
    assert found.startswith(f"megatron_opd.{module} {line}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("__main__", "from megatron_opd import train"),
        ("loss.kl", "import torch\nfrom megatron_opd.loss.shard import VocabShard"),
        ("loss.kl", "from megatron_opd.types import Head"),
        ("model.spec", "from megatron.core import transformer\nfrom . import gpt"),
        ("model", "from megatron.core import transformer"),
        ("job", "from megatron_opd import build, checkpoint\nimport torch.utils.data"),
    ],
)
def test_what_is_allowed_is_not_reported(module, source):
    assert violations({f"megatron_opd.{module}": source}) == []


def test_tools_do_not_reach_into_megatron_or_train():
    assert violations({"tools.x": "import megatron.core"}) == ["tools.x imports megatron"]
    assert violations({"tools.x": "from megatron_opd.train import main"}) == [
        "tools.x imports train"
    ]
