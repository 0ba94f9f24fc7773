"""A working directory whose two models know something, and a verifier that is often wrong."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_opd.config_file import load_config
from tests.home import make_home

OVERRIDES = ("rollout.max_tokens=12", "rollout.n=3", f"eval.reward={__name__}:even")


def even(response: str, _) -> float:
    """Call responses of an even number of characters right."""
    return float(len(response) % 2 == 0)


def make_models(folder: Path, *, same: bool = False, answers: bool = True) -> Path:
    """Write two models with random weights (or one of them twice) and ten prompts."""
    make_home(folder)
    for name, seed in (("student", 1), ("teacher", 2)):
        draw, path = torch.Generator().manual_seed(seed), folder / name / "model.safetensors"
        weights = {
            key: float("norm" in key) + 0.2 * torch.randn(zeros.shape, generator=draw)
            for key, zeros in sorted(load_file(path).items())
        }
        save_file(weights, path)
    if same:
        for file in ("config.json", "model.safetensors"):
            (folder / "teacher" / file).write_bytes((folder / "student" / file).read_bytes())
    if not answers:
        lines = [json.dumps({"prompt": "x" * n}) for n in range(1, 11)]
        (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def read(folder: Path, *overrides: str):
    """Return the config with its paths made absolute."""
    paths = [f"student.path={folder}/student", f"teacher.path={folder}/teacher"]
    paths.append(f"data.prompts=[{folder}/prompts.jsonl]")
    return load_config([folder / "config.yaml"], [*paths, *OVERRIDES, *overrides])
