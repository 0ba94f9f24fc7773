"""The recipes plan what they say they do: on the public models' config.json, without their weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_opd.build import load_tokenizer
from megatron_opd.config_file import load_config
from tests.tokenizers import train_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ROWS = 130  # two steps of 64 prompts, and two prompts over

QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
QWEN3_1_7B = {
    **QWEN3,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
}
QWEN3_4B = {
    **QWEN3,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
}
R1_DISTILL_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 21,
    "torch_dtype": "bfloat16",
}
RECIPES = {
    "qwen3_1.7b_from_4b": {"Qwen3-1.7B-Base": QWEN3_1_7B, "Qwen3-4B": QWEN3_4B},
    "r1_distill_1.5b_from_justrl": {
        "DeepSeek-R1-Distill-Qwen-1.5B": R1_DISTILL_1_5B,
        "JustRL-DeepSeek-1.5B": R1_DISTILL_1_5B,
    },
}
BILLIONS = {"qwen3_1.7b_from_4b": (1.72, 4.02), "r1_distill_1.5b_from_justrl": (1.78, 1.78)}


def parameters(network: dict) -> int:
    """Count the parameters of a decoder from its shape."""
    hidden, qwen3 = network["hidden_size"], network["model_type"] == "qwen3"
    head_dim = network.get("head_dim", hidden // network["num_attention_heads"])
    q, kv = (head_dim * network[f"num_{x}_heads"] for x in ("attention", "key_value"))
    attention = hidden * (q + 2 * kv) + q * hidden + (2 * head_dim if qwen3 else q + 2 * kv)
    layer = attention + 3 * hidden * network["intermediate_size"] + 2 * hidden
    tables = 1 if network["tie_word_embeddings"] else 2
    return (
        network["num_hidden_layers"] * layer + tables * hidden * network["vocab_size"] + hidden
    )


def write_model(folder: Path, network: dict) -> None:
    """Write config.json and a tokenizer that says of its class what the published one says."""
    train_tokenizer(folder, ["Find the sum of 3 and 4."] * 9)
    (folder / "config.json").write_text(json.dumps(network))
    if network["model_type"] == "qwen2":
        path = folder / "tokenizer_config.json"
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "tokenizer_class": "LlamaTokenizerFast"}))


def write_home(folder: Path, models: dict[str, dict]) -> Path:
    """Write what a recipe expects in its working directory."""
    for name, network in models.items():
        write_model(folder / "models" / name, network)
    question = "What is {} + 1? Please reason step by step, and put your final answer within \\boxed{{}}."
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": question.format(number)}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(number + 1), "style": "rule"},
        }
        for number in range(ROWS)
    ]
    (folder / "data").mkdir()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "data" / "dapo-math-17k-boxed.parquet")
    return folder


def plan(recipe: str, home: Path, *words: str) -> str:
    """Return what the dry run of a recipe prints for eight ranks."""
    config = EXAMPLES / recipe / "config.yaml"
    answer = subprocess.run(
        [sys.executable, "-m", "megatron_opd", config, *words, "--dry-run", "--ranks", "8"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_plans_the_papers_table(tmp_path, recipe):
    models = RECIPES[recipe]
    home = write_home(tmp_path, models)
    told = plan(recipe, home)
    for (name, network), billions in zip(models.items(), BILLIONS[recipe], strict=True):
        assert round(parameters(network) / 1e9, 2) == billions
        assert f"{parameters(network):,} parameters, models/{name}" in told
    assert f"{ROWS} prompts" in told and "2 steps of 64 prompts × 4 responses" in told
    assert "8 = tp 2 × pp 1 × dp 4" in told
    assert "a replica has 64 sequences" in told
    # nothing but the weights is missing, and every option has an effect
    warnings = [line for line in told.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: {kind}.path: 'models/{name}' has no *.safetensors weights"
        for kind, name in zip(("student", "teacher"), models, strict=True)
    ]
    assert sorted(path.name for path in home.iterdir()) == ["data", "models"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_and_its_readme_says_how_much_it_needs(tmp_path, recipe):
    told = plan(recipe, write_home(tmp_path, RECIPES[recipe]))
    table = told[told.index("memory of") : told.index("warning")].rstrip()
    peak = float(re.search(r"peak +([\d.]+)$", table)[1])
    assert 5 < peak < 60  # of 80 GB: the rest is CUDA's, NCCL's and the allocator's
    assert table in (EXAMPLES / recipe / "README.md").read_text()
