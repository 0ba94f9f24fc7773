"""A model with random weights and a tokenizer, and tools run on ranks."""

from pathlib import Path

from tests.distributed import run_ranks
from tests.hf import hf_model
from tests.prompts import write
from tests.tokenizers import train_tokenizer


def make_model(folder: Path, seed: int = 0, family: str = "qwen3") -> Path:
    """Write a tiny model that writes any byte, and now and then ends."""
    train_tokenizer(folder)
    model = hf_model(family, seed=seed, vocab_size=260, num_hidden_layers=2)
    model.generation_config.eos_token_id = list(range(2, 22))  # or it would never stop
    model.save_pretrained(folder)
    return folder


def make_questions(path: Path, count: int = 7) -> Path:
    """Write questions of different lengths, from two sources."""
    rows = [
        {"prompt": f"{i}{'+1' * i}=?", "answer": str(2 * i), "data_source": f"set{i % 2}"}
        for i in range(count)
    ]
    write(path, rows)
    return path


def even(response: str, prompt) -> float:
    """A reward that any model gets now and then."""
    return float(len(response) % 2 == 0)


def run_tool(main, words, world: int = 1) -> list[int]:
    """Run a tool's `main` on gloo ranks; return the exit codes."""
    return run_ranks(_run, world, main, [str(word) for word in words])


def _run(rank, main, words):
    return main(words)
