"""Students and teachers of which it is known what is wrong with them: tiny, trained by the loop.

A prompt is three letters; the answer walks from its last letter through a chain of all letters to
the end of that chain. The teacher walks one chain inside its chat template, `<abc>`, and another
one, a habit from before, without it.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_opd import train
from megatron_opd.config_file import load_config
from tests.distributed import run_ranks
from tests.tiny import qwen3

LETTERS = "abcdefghijklmnop"
CHAINS = {"<{}>": "hbnekpagmdojcifl", "{}": "dlagiojhmknbpfec"}  # prompt → the walk
END = "!"
CONFIG = """
student: {path: student, dtype: float32}
teacher: {path: teacher}
data: {prompts: [prompts.jsonl], chat_template: tokenizer, max_prompt_tokens: 8}
rollout: {n: 1, max_tokens: 20}
train: {prompts_per_step: 32, microbatch_tokens: 2048}
run: {dir: runs/doctor}
"""
TRAIN = """
student: {dtype: float32}
data: {chat_template: none, max_prompt_tokens: 8, shuffle: true}
rollout: {engine: replay, n: 1, max_tokens: 20}
objective: {support: sampled, divergence: cross_entropy}
optimizer: {lr: 1.0e-2, warmup_steps: 2, betas: [0.9, 0.95]}
train: {prompts_per_step: 64, epochs: 50, microbatch_tokens: 4096}
run: {print_every: 50}
"""


def walk(chain: str, letter: str) -> str:
    """Return the letters after `letter`, to the end of the chain."""
    return chain[chain.index(letter) + 1 :] + "."


def write_rows(file: Path, templates: dict[str, str], *, count: int, seed: int) -> None:
    """Write prompts in every template, with the walk of its chain as answer and response."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        letters = "".join(draw.choices(LETTERS, k=3))
        for template, chain in templates.items():
            answer = walk(chain, letters[-1])
            rows.append({"prompt": template.format(letters), "answer": answer, "response": answer})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_network(folder: Path) -> Path:
    """Write a Hugging Face directory without weights: one token per character."""
    vocabulary = {token: index for index, token in enumerate([END, *"<>.?", *LETTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token=END, pad_token=END)
    tokenizer.chat_template = "<{{ messages[-1]['content'] }}>"
    tokenizer.save_pretrained(folder)
    network = qwen3(
        vocab_size=len(vocabulary),
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.05,
    )
    (folder / "config.json").write_text(json.dumps(network))
    return folder


def train_model(home: Path, name: str, start: Path, rows: Path, *words: str) -> Path:
    """Train from `start`, on responses alone, by the project's own loop; return the model."""
    weights = "hf" if list(start.glob("*.safetensors")) else "random"
    run = home / f"runs/{name}"
    paths = [f"student.path={start}", f"student.init={weights}", f"data.prompts=[{rows}]"]
    (home / "train.yaml").write_text(TRAIN)
    run_ranks(_train, 1, str(home / "train.yaml"), [*paths, f"run.dir={run}", *words])
    (exported,) = (run / "hf").iterdir()
    return exported


def _train(rank: int, file: str, words: list[str]) -> None:
    train.main(load_config([file], words))


def make_pairs(home: Path) -> Path:
    """Write the config of a good pair, and beside it the teachers that are wrong."""
    taught = CHAINS["<{}>"]
    write_rows(home / "both.jsonl", CHAINS, count=1500, seed=1)
    write_rows(home / "one.jsonl", dict.fromkeys(CHAINS, taught), count=1500, seed=2)
    write_rows(home / "prompts.jsonl", {"{}": taught}, count=200, seed=3)
    (home / "config.yaml").write_text(CONFIG)
    start = write_network(home / "network")
    teacher = train_model(home, "teacher", start, home / "both.jsonl", "train.steps=110")
    student = train_model(home, "student", start, home / "one.jsonl", "train.steps=22")
    few = ("train.steps=3", "optimizer.warmup_steps=0", "optimizer.lr=1.0e-4")
    further = train_model(home, "further", student, home / "one.jsonl", *few)
    for name, model in (("teacher", teacher), ("student", student), ("further", further)):
        (home / name).symlink_to(model)
    draw = torch.Generator().manual_seed(0)
    _spoilt(teacher, home / "zeroed", torch.zeros_like)
    _spoilt(teacher, home / "constant", lambda tensor: torch.full_like(tensor, 0.1))
    _spoilt(teacher, home / "random", lambda x: 0.3 * torch.randn(x.shape, generator=draw))
    _other_tokenizer(teacher, home / "other_tokenizer")
    return home


def _spoilt(model: Path, folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Write a model with other weights."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: change(tensor) for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def _other_tokenizer(model: Path, folder: Path) -> None:
    """Exchange two letters: the same size, the same tokens, other ids."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
