"""A working directory as a user has it: two tiny models, prompts, a config."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_opd.model import architecture
from megatron_opd.model.hf_map import manifest
from tests.tiny import qwen3
from tests.tokenizers import train_tokenizer

CONFIG = """
student: {path: student, dtype: float32}
teacher: {path: teacher}
data: {prompts: [prompts.jsonl], max_prompt_tokens: 64}
rollout: {n: 2, max_tokens: 36}
train: {prompts_per_step: 4, microbatch_tokens: 128}
run: {dir: runs/one}
"""


def make_home(folder: Path) -> Path:
    """Write both models (their weights are only there to be seen), ten prompts and the config."""
    for name, layers in (("student", 4), ("teacher", 2)):
        train_tokenizer(folder / name)
        network = qwen3(vocab_size=260, num_hidden_layers=layers)
        (folder / name / "config.json").write_text(json.dumps(network))
        shapes = manifest(architecture(network))
        weights = {tensor: torch.zeros(shape) for tensor, shape in shapes.items()}
        save_file(weights, folder / name / "model.safetensors")
    lines = [json.dumps({"prompt": "x" * n, "answer": "1"}) for n in range(1, 11)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(CONFIG)
    return folder
