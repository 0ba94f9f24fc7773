"""Config → parts: tokenizer, prompts, student, teacher, engine, objective."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from megatron_opd import config as cfg
from megatron_opd.data import encode_response, load_prompts
from megatron_opd.loss import Objective
from megatron_opd.model import build_model, load_hf, padded_vocab, read_config
from megatron_opd.parallel import Parallel
from megatron_opd.rollout import RolloutEngine, Sampling
from megatron_opd.rollout.megatron import MegatronEngine
from megatron_opd.rollout.replay import ReplayEngine
from megatron_opd.step import Student, make_student
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.types import Prompt

log = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a Hugging Face directory, without a network."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def stop_ids(config: cfg.Config, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's, generation_config's, and the config's.

    Base models end with one token and their chat templates with another: either must stop them.
    """
    ids = {tokenizer.eos_token_id, *config.rollout.stop_token_ids}
    if (Path(config.student.path) / "generation_config.json").exists():
        listed = GenerationConfig.from_pretrained(config.student.path).eos_token_id
        ids.update(listed if isinstance(listed, list) else [listed])
    return tuple(sorted(ids - {None}))


def load_data(config: cfg.Config, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Read the training and the evaluation prompts; rank 0 does this for all.

    Raises:
        ValueError: see `load_prompts`; or fewer prompts than a step takes.
    """
    needed = ("response",) if config.rollout.engine == "replay" else ()
    prompts = load_prompts(config.data, tokenizer, require=needed)
    if len(prompts) < config.train.prompts_per_step:
        raise ValueError(
            f"train.prompts_per_step: got {config.train.prompts_per_step}, expected at most the "
            f"{len(prompts)} prompts in data.prompts"
        )
    held_out = load_prompts(config.data, tokenizer, config.eval.prompts, require=("answer",))
    return prompts, held_out


def count_steps(config: cfg.Config, prompts: int) -> int:
    """Return the number of updates: train.steps, or the full batches of train.epochs passes."""
    return config.train.steps or prompts * config.train.epochs // config.train.prompts_per_step


def sampling(config: cfg.Config, stops: tuple[int, ...]) -> Sampling:
    """Return how training responses are drawn."""
    r = config.rollout
    return Sampling(r.max_tokens, r.temperature, r.top_p, r.top_k, stops)


def eval_sampling(config: cfg.Config, stops: tuple[int, ...]) -> Sampling:
    """Return how evaluation responses are drawn."""
    e = config.eval
    return Sampling(e.max_tokens or config.rollout.max_tokens, e.temperature, e.top_p, 0, stops)


def build_student(
    config: cfg.Config, parallel: Parallel, *, vocab_size: int, steps: int
) -> Student:
    """Build the student on its ranks, with its weights, gradient buffers and optimiser."""
    model = build_model(
        config.student.path,
        parallel,
        dtype=DTYPES[config.student.dtype],
        megatron={**_recompute(config.train.recompute), **config.megatron},
    )
    if config.student.init == "hf":
        load_hf(model, config.student.path, parallel, vocab_size=vocab_size)
    else:
        init_random(model, config.student.path, parallel, seed=config.seed)
    return make_student(model, parallel, config.optimizer, steps=steps, vocab_size=vocab_size)


def build_teacher(
    config: cfg.Config, parallel: Parallel, *, vocab_size: int
) -> MegatronTeacher | None:
    """Build the frozen teacher beside the student, its vocabulary cut to the student's shards."""
    if config.teacher is None:
        return None
    rows = read_config(config.student.path)["vocab_size"]
    model = build_model(
        config.teacher.path,
        parallel,
        dtype=DTYPES[config.teacher.dtype or config.student.dtype],
        padded_vocab=padded_vocab(rows, parallel.tp),
        trainable=False,
    )
    load_hf(model, config.teacher.path, parallel, vocab_size=vocab_size)
    return MegatronTeacher(
        model, parallel, vocab_size=vocab_size, offload=config.teacher.offload
    )


def build_engine(config: cfg.Config, student: Student, tokenizer: Any) -> RolloutEngine:
    """Build what writes the training responses."""
    if config.rollout.engine == "replay":
        return ReplayEngine(partial(encode_response, tokenizer))
    return embedded_engine(config, student)


def embedded_engine(config: cfg.Config, student: Student) -> MegatronEngine:
    """Build the engine that generates with the student itself: rollouts and evaluation."""
    return MegatronEngine(
        student.model,
        student.parallel,
        vocab_size=student.vocab_size,
        batch_size=config.rollout.batch_size,
    )


def build_objective(config: cfg.Config) -> Objective:
    """Translate the objective section, and tell the loss how hot the rollouts were."""
    return Objective(
        **config.objective.model_dump(), rollout_temperature=config.rollout.temperature
    )


def _recompute(kind: str) -> dict[str, Any]:
    """Translate train.recompute into Megatron's fields."""
    if kind == "none":
        return {}
    if kind == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
