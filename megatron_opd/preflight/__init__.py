"""What is wrong or too large, found before a model is loaded.

`check` reads a few small files and runs on every rank, before they meet. `preflight` adds what is
worth doing once: tokenizers, prompts, and the arithmetic of batches and memory.
"""

from megatron_opd.preflight.models import load_tokenizer
from megatron_opd.preflight.plan import Plan, check, check_writer, preflight, render

__all__ = ["Plan", "check", "check_writer", "load_tokenizer", "preflight", "render"]
