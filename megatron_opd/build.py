"""Config → parts: tokenizer, prompts, student, teacher, engine, objective."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from megatron_opd import config as cfg
from megatron_opd.config_file import load_config
from megatron_opd.data import encode_response, load_prompts
from megatron_opd.loss import Objective
from megatron_opd.metrics import RunLog
from megatron_opd.model import architecture, build_model, load_hf, padded_vocab
from megatron_opd.parallel import Parallel
from megatron_opd.reward import REWARDS
from megatron_opd.rollout import RolloutEngine, Sampling, request_seed
from megatron_opd.rollout.megatron import MegatronEngine
from megatron_opd.rollout.replay import ReplayEngine
from megatron_opd.rollout.server import Server
from megatron_opd.rollout.vllm_server import ServerEngine
from megatron_opd.step import Student, make_student
from megatron_opd.teacher import Teacher
from megatron_opd.teacher.megatron import MegatronTeacher, Payload
from megatron_opd.teacher.server import ServerTeacher
from megatron_opd.types import Prompt, Reward

log = logging.getLogger("megatron_opd")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RECOMPUTE: dict[str, dict[str, Any]] = {  # train.recompute → Megatron's fields
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a Hugging Face directory, without a network."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def stop_ids(folder: str, tokenizer: Any, more: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's, generation_config.json's, and `more`.

    Base models end with one token and their chat templates with another; their files often name
    only one.

    Raises:
        ValueError: generation_config.json cannot be read.
    """
    ids, path = {tokenizer.eos_token_id, *more}, Path(folder) / "generation_config.json"
    if path.exists():
        try:
            listed = json.loads(path.read_text()).get("eos_token_id")
        except (json.JSONDecodeError, AttributeError):
            raise ValueError(f"'{path}': not a JSON object") from None
        ids.update(listed if isinstance(listed, list) else [listed])
    return tuple(sorted(ids - {None}))


def load_data(
    config: cfg.Config, tokenizer: Any, warn: Callable[[str], None]
) -> tuple[list[Prompt], list[Prompt]]:
    """Read the training and the evaluation prompts; rank 0 does this for all.

    Raises:
        ValueError: see `load_prompts`; or fewer prompts than a step takes.
    """
    needed = ("response",) if config.rollout.engine == "replay" else ()
    prompts = load_prompts(config.data, tokenizer, require=needed, warn=warn)
    if len(prompts) < config.train.prompts_per_step:
        raise ValueError(
            f"train.prompts_per_step: got {config.train.prompts_per_step}, expected at most the "
            f"{len(prompts)} prompts in data.prompts"
        )
    if not config.eval.prompts:
        return prompts, []
    return prompts, load_prompts(
        config.data, tokenizer, config.eval.prompts, require=("answer",), warn=warn
    )


def count_steps(config: cfg.Config, prompts: int) -> int:
    """Return the number of updates: train.steps, or the full batches of train.epochs passes."""
    return config.train.steps or prompts // config.train.prompts_per_step * config.train.epochs


def samplings(
    config: cfg.Config, objective: Objective, stops: tuple[int, ...]
) -> tuple[Sampling, Sampling]:
    """Return how training responses and how evaluation responses are drawn."""
    r, e = config.rollout, config.eval
    longest = e.max_tokens or r.max_tokens
    listed = listed_ids(config, objective)
    return (
        Sampling(r.max_tokens, r.temperature, r.top_p, r.top_k, stops, listed),
        Sampling(longest, e.temperature, e.top_p, 0, stops),
    )


def listed_ids(config: cfg.Config, objective: Objective) -> int:
    """Return how many of the most likely ids come with every token of a training response."""
    if config.rollout.logprobs is not None:
        return config.rollout.logprobs
    return objective.k if "rollout_ids_CK" in objective.wants else 0


def megatron_fields(config: cfg.Config) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that the config asks for."""
    return {**RECOMPUTE[config.train.recompute], **config.megatron}


def build_student(
    config: cfg.Config, parallel: Parallel, *, vocab_size: int, steps: int
) -> Student:
    """Build the student on its ranks, with its weights, gradient buffers and optimiser."""
    random = config.student.init == "random"
    model = build_model(
        config.student.path,
        parallel,
        dtype=DTYPES[config.student.dtype],
        megatron=megatron_fields(config),
        seed=config.seed if random else None,
    )
    if not random:
        load_hf(model, config.student.path, parallel, vocab_size=vocab_size)
    return make_student(model, parallel, config.optimizer, steps=steps, vocab_size=vocab_size)


def judges(config: cfg.Config, objective: Objective) -> dict[str, tuple[cfg.Frozen, Payload]]:
    """Return the sections of the frozen models on our ranks, and what each is to answer."""
    found: dict[str, tuple[cfg.Frozen, Payload]] = {}
    if config.teacher is not None and config.teacher.kind == "megatron":
        found["teacher"] = config.teacher, config.teacher.payload
    if config.base is not None:
        one_token_does = not any(objective.needs_hidden(topk=False))
        found["base"] = config.base, "sampled" if one_token_does else "hidden"
    return found


def build_judges(
    config: cfg.Config, objective: Objective, parallel: Parallel, *, vocab_size: int
) -> dict[str, Teacher]:
    """Build the frozen models beside the student, their vocabularies cut to its shards."""
    rows = architecture(config.student.path).vocab_rows
    built: dict[str, Teacher] = {}
    teacher = config.teacher
    if teacher is not None and teacher.kind == "server":
        assert teacher.payload != "hidden"
        built["teacher"] = ServerTeacher(
            connect(teacher, config),
            parallel,
            vocab_size=vocab_size,
            payload=teacher.payload,
            k=objective.k,
        )
    for name, (section, payload) in judges(config, objective).items():
        model = build_model(
            section.path,
            parallel,
            dtype=DTYPES[section.dtype or config.student.dtype],
            padded_vocab=padded_vocab(rows, parallel.tp),
            trainable=False,
            seed=None,
        )
        load_hf(model, section.path, parallel, vocab_size=vocab_size)
        built[name] = MegatronTeacher(
            model,
            parallel,
            vocab_size=vocab_size,
            offload=section.offload,
            payload=payload,
            k=objective.k,
            temperature=objective.teacher_temperature,
            chunk_tokens=objective.chunk_tokens,
        )
    return built


def build_engines(
    config: cfg.Config, student: Student, tokenizer: Any
) -> tuple[RolloutEngine, RolloutEngine]:
    """Build what writes the training responses, and what writes those that evaluation scores."""
    if config.rollout.engine == "vllm":
        engine = _vllm_engine(config, student)
        return engine, engine
    if config.rollout.engine == "vllm_server":
        server, size = connect(config.rollout, config), student.vocab_size
        engine = ServerEngine(student.model, student.parallel, server, vocab_size=size)
        return engine, engine
    embedded = MegatronEngine(
        student.model,
        student.parallel,
        vocab_size=student.vocab_size,
        batch_size=config.rollout.batch_size,
    )
    if config.rollout.engine == "replay":
        return ReplayEngine(partial(encode_response, tokenizer)), embedded
    return embedded, embedded


def connect(section: cfg.Rollout | cfg.Teacher, config: cfg.Config) -> Server:
    """Return the client of the server that a section names."""
    assert section.url is not None
    return Server(
        section.url,
        in_flight=config.rollout.batch_size,
        timeout=section.timeout_s,
        retries=section.retries,
    )


def _vllm_engine(config: cfg.Config, student: Student) -> RolloutEngine:
    # takes seconds, and is not always there
    from megatron_opd.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        student.model,
        student.parallel,
        folder=config.student.path,
        vocab_size=student.vocab_size,
        tp=config.rollout.tp,
        batch_size=config.rollout.batch_size,
        max_length=config.longest_sequence,
        seed=request_seed(config.seed, student.parallel.rank),
        options=config.vllm,
    )


def build_objective(config: cfg.Config) -> Objective:
    """Translate the objective section, and tell the loss how the responses were drawn.

    Raises:
        ValueError: a name that is unknown, or options that exclude each other.
    """
    section = config.objective
    drawn = config.rollout.engine != "replay"
    return Objective(
        **section.model_dump(exclude={"support", "divergence", "weights"}),
        support=_named("objective.support", section.support),
        divergence=_named("objective.divergence", section.divergence),
        weights={_named("objective.weights", name): own for name, own in section.weights.items()},
        rollout_temperature=config.rollout.temperature if drawn else None,
        correction=config.rollout.correction,
        correction_low=config.rollout.correction_low,
        correction_high=config.rollout.correction_high,
        position_bucket=config.metrics.position_bucket,
        max_tokens=config.rollout.max_tokens,
    )


def _named(key: str, name: str) -> Any:
    """Return the user's function that "module:attr" names; the loss knows its own names."""
    return cfg.resolve(key, name, {}) if ":" in name else name


def build_reward(config: cfg.Config) -> Reward:
    """Find the function that scores evaluation responses."""
    return cfg.resolve("eval.reward", config.eval.reward, REWARDS)


def open_log(config: cfg.Config, resume_step: int) -> RunLog:
    """Open the run directory: metrics, their mirrors, the resolved config; rank 0 only.

    A resumed run says which keys are others than before: it goes on, but it is another run.
    """
    folder = Path(config.run.dir)
    run_log = RunLog(
        folder,
        config.model_dump(mode="json"),
        tensorboard=config.run.tensorboard,
        wandb=config.run.wandb,
        resume_step=resume_step,
    )
    resolved = folder / "config.yaml"
    if resolved.exists():
        for line in cfg.differences(load_config([resolved]), config):
            log.warning("resumed with another config: %s", line)
    resolved.write_text(cfg.to_yaml(config))
    return run_log
