"""The recipes plan what they say, on the public models' config.json and without their weights."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_opd import platform
from megatron_opd.config_file import load_config
from megatron_opd.inputs import load_tokenizer
from tests.tokenizers import train_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*/run.sh"), *EXAMPLES.glob("*/*.sbatch")])
ROWS = 130  # two steps of 64 prompts, and two prompts over
BOXED = "Please reason step by step, and put your final answer within \\boxed{{}}."

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
QWEN3_32B = {
    **QWEN3,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 25600,
    "max_position_embeddings": 40960,
    "max_window_layers": 64,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
QWEN3_30B_A3B = {
    **QWEN3_MOE,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "max_position_embeddings": 32768,
    "max_window_layers": 48,
}
QWEN3_235B_A22B = {
    **QWEN3_MOE,
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "max_position_embeddings": 40960,
    "max_window_layers": 94,
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
    "qwen3_1.7b_from_32b": {"Qwen3-1.7B-Base": QWEN3_1_7B, "Qwen3-32B": QWEN3_32B},
    "qwen3_30b_a3b_from_235b_a22b": {
        "Qwen3-30B-A3B-Base": QWEN3_30B_A3B,
        "Qwen3-235B-A22B": QWEN3_235B_A22B,
    },
}
NODE = ["8 = tp 2 × pp 1 × dp 4\n", "on a replica about 64 sequences in"]
LAYOUTS = {  # ranks, and what the dry run says of them
    "qwen3_1.7b_from_4b": (8, NODE),
    "r1_distill_1.5b_from_justrl": (8, NODE),
    "qwen3_1.7b_from_32b": (
        8,
        [
            "8 = tp 1 × pp 1 × dp 8\n",
            "teacher.parallel: tp 4 × pp 1 × 2 copies\n",
            "on a replica about 32 sequences in",
        ],
    ),
    "qwen3_30b_a3b_from_235b_a22b": (
        32,
        [
            "32 = tp 1 × pp 1 × ep 8 × dp 32\n",
            "teacher.parallel: tp 4 × pp 2 × ep 16 × 4 copies\n",
            "on a replica about 8 sequences in",
        ],
    ),
}
TABLE_2 = {
    "student.dtype": "bfloat16",
    "data.max_prompt_tokens": 1024,
    "data.shuffle": False,
    "rollout.n": 4,
    "rollout.max_tokens": 7168,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "objective.support": "student_topk",
    "objective.k": 16,
    "objective.divergence": "reverse_kl",
    "objective.student_temperature": 1.0,
    "objective.teacher_temperature": 1.0,
    "optimizer.lr": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "train.prompts_per_step": 64,
    "train.epochs": 1,
    "train.steps": None,
}
BILLIONS = {
    "qwen3_1.7b_from_4b": (1.72, 4.02),
    "r1_distill_1.5b_from_justrl": (1.78, 1.78),
    "qwen3_1.7b_from_32b": (1.72, 32.76),
    "qwen3_30b_a3b_from_235b_a22b": (30.53, 235.09),
}


def parameters(network: dict) -> int:
    """Count the parameters of a decoder from its shape."""
    hidden, qwen3 = network["hidden_size"], network["model_type"] != "qwen2"
    head_dim = network.get("head_dim", hidden // network["num_attention_heads"])
    q, kv = (head_dim * network[f"num_{x}_heads"] for x in ("attention", "key_value"))
    attention = hidden * (q + 2 * kv) + q * hidden + (2 * head_dim if qwen3 else q + 2 * kv)
    experts, ffn = network.get("num_experts", 0), network["intermediate_size"]
    if experts:
        ffn = experts * network["moe_intermediate_size"]
    layer = attention + 3 * hidden * ffn + hidden * experts + 2 * hidden
    tables = 1 if network["tie_word_embeddings"] else 2
    return network["num_hidden_layers"] * layer + tables * hidden * network["vocab_size"] + hidden


def write_model(folder: Path, network: dict) -> None:
    """Write config.json, and a tokenizer that names the class which the published one names."""
    train_tokenizer(folder, ["Find the sum of 3 and 4."] * 9)
    (folder / "config.json").write_text(json.dumps(network))
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text())
    llama = network["model_type"] == "qwen2"
    told["tokenizer_class"] = "LlamaTokenizerFast" if llama else "Qwen2Tokenizer"
    path.write_text(json.dumps(told))


def write_home(folder: Path, models: dict[str, dict]) -> Path:
    """Write what a recipe expects in its working directory."""
    for name, network in models.items():
        write_model(folder / "models" / name, network)
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"What is {number} + 1? {BOXED}"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(number + 1), "style": "rule"},
        }
        for number in range(ROWS)
    ]
    (folder / "data").mkdir()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "data" / "dapo-math-17k-boxed.parquet")
    return folder


def short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@dataclass(frozen=True)
class Planned:
    recipe: str
    home: Path
    told: str  # what the dry run for its ranks printed

    @property
    def folder(self) -> Path:
        return EXAMPLES / self.recipe


@pytest.fixture(scope="module", params=RECIPES)
def planned(request, tmp_path_factory):
    recipe = request.param
    home = write_home(tmp_path_factory.mktemp(recipe), RECIPES[recipe])
    config, (ranks, _) = EXAMPLES / recipe / "config.yaml", LAYOUTS[recipe]
    answer = subprocess.run(
        [sys.executable, "-m", "megatron_opd", config, "--dry-run", "--ranks", str(ranks)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return Planned(recipe, home, answer.stdout)


def test_a_dry_run_plans_the_step_of_the_paper(planned):
    assert f"{ROWS} prompts" in planned.told
    assert "2 steps of 64 prompts × 4 responses" in planned.told
    assert all(line in planned.told for line in LAYOUTS[planned.recipe][1])
    assert sorted(path.name for path in planned.home.iterdir()) == ["data", "models"]


def test_a_dry_run_counts_the_parameters(planned):
    models = RECIPES[planned.recipe].items()
    for (name, network), billions in zip(models, BILLIONS[planned.recipe], strict=True):
        assert round(parameters(network) / 1e9, 2) == billions
        assert f"{parameters(network):,} parameters, models/{name}" in planned.told


def test_nothing_but_the_weights_is_missing_and_every_option_has_an_effect(planned):
    warnings = [line for line in planned.told.splitlines() if line.startswith("warning")]
    missing = [
        f"warning: {kind}.path: 'models/{name}' has no *.safetensors weights"
        for kind, name in zip(("student", "teacher"), RECIPES[planned.recipe], strict=True)
    ]
    away = load_config([planned.folder / "config.yaml"]).judging[""].offload
    if away and platform.device().type == "cpu":
        missing.append(
            "warning: teacher.offload: needs a GPU, and there is none; set teacher.offload=false"
        )
    assert warnings == missing


def test_it_fits_with_room_to_spare_and_the_readme_says_so(planned):
    table = planned.told[planned.told.index("memory of") : planned.told.index("warning")].rstrip()
    peak = re.search(r"peak +([\d.]+)$", table)
    assert peak and 10 < float(peak[1]) < 60  # GiB of 80
    assert table in (planned.folder / "README.md").read_text()


def test_the_config_is_table_2(planned):
    config = load_config([planned.folder / "config.yaml"])
    for path, value in TABLE_2.items():
        section, key = path.split(".")
        assert getattr(getattr(config, section), key) == value, path
    assert 17_917 // config.train.prompts_per_step == 279  # steps of the real file


def test_a_tokenizer_keeps_spaces_whatever_class_its_file_names(planned):
    """transformers 5 can take such a class at its word, and then drops every space."""
    text = "Find  the sum\n of 3 and 4."
    for name in RECIPES[planned.recipe]:
        tokenizer = load_tokenizer(str(planned.home / "models" / name))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_stop_ids_are_the_families_own(planned):
    config = load_config([planned.folder / "config.yaml"])
    end_of_text, im_end_or_assistant = 151643, 151645
    if planned.recipe.startswith("qwen3"):
        assert set(config.rollout.stop_token_ids) == {end_of_text, im_end_or_assistant}
    else:
        assert im_end_or_assistant not in config.rollout.stop_token_ids


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.yaml")), ids=short)
def test_every_config_loads_and_is_short(path):
    below = {"custom_loss": "quickstart/distill.yaml", "methods": "methods/base.yaml"}
    on_top_of = below.get(path.parent.name)
    load_config([*([EXAMPLES / on_top_of] if on_top_of else []), path])
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", SCRIPTS, ids=short)
def test_every_script_is_executable_bash(path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    if path.name == "run.sh":
        assert len(path.read_text().splitlines()) <= 15


def test_every_recipe_is_tested():
    assert {path.parent.name for path in SCRIPTS if path.name == "run.sh"} == set(RECIPES)
