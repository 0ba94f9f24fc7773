"""A task that a tiny model learns in a minute: column addition with the work shown.

    347+285=   →   7+5=12,4+8+1=13,3+2+1=6;632

Columns are added from the right, each with its carry; then the sum is written out. One slip early
in a response spoils everything after it, which is what on-policy distillation is about.
"""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+=,;-*/()[]<>.:?! abcdefghijklmnopqrstuvwxyz"
END = "<|endoftext|>"


def question_and_answer(a: int, b: int) -> tuple[str, str]:
    """Return the prompt and the worked response for a + b."""
    left, right, carry, work = str(a)[::-1], str(b)[::-1], 0, []
    for column in range(max(len(left), len(right))):
        digits = [int(number[column]) for number in (left, right) if column < len(number)]
        terms = digits + [carry] * (carry > 0)
        work.append("+".join(map(str, terms)) + f"={sum(terms)}")
        carry = sum(terms) // 10
    return f"{a}+{b}=", ",".join(work) + f";{a + b}"


def write_data(folder: Path, *, train: int, test: int, digits: int, seed: int) -> None:
    """Write train.jsonl and test.jsonl: sums of two numbers of `digits` digits, none in both."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, seen, rows = random.Random(seed), set(), []
    while len(rows) < train + test:
        pair = tuple(draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        if pair not in seen:
            seen.add(pair)
            prompt, response = question_and_answer(*pair)
            rows.append({"prompt": prompt, "answer": response, "response": response})
    for name, part in {"train": rows[test:], "test": rows[:test]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)


def write_model(folder: Path, *, hidden: int, layers: int) -> None:
    """Write a Hugging Face directory without weights: a small Qwen3 and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "initializer_range": 0.05,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character."""
    vocabulary = {token: index for index, token in enumerate([END, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token=END, pad_token=END)
