"""Config → parts: student, judges, engines, objective, rewards, log."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_opd import config as cfg
from megatron_opd import parallel as mesh
from megatron_opd import schedule
from megatron_opd.config_file import load_config
from megatron_opd.data import encode_response
from megatron_opd.judging import Judges
from megatron_opd.loss import Objective, Total
from megatron_opd.metrics import RunLog
from megatron_opd.model import architecture, build_model, load_head, load_hf, padded_vocab
from megatron_opd.parallel import Parallel
from megatron_opd.reward import REWARDS
from megatron_opd.rollout import RolloutEngine, Sampling, request_seed
from megatron_opd.rollout.megatron import MegatronEngine
from megatron_opd.rollout.mixed import MixedEngine
from megatron_opd.rollout.replay import ReplayEngine
from megatron_opd.rollout.server import Server
from megatron_opd.rollout.vllm_server import ServerEngine
from megatron_opd.step import Student, make_student
from megatron_opd.teacher import Teacher
from megatron_opd.teacher.ema import EmaTeacher
from megatron_opd.teacher.megatron import MegatronTeacher, Payload, copy_weights
from megatron_opd.teacher.mesh import MeshTeacher
from megatron_opd.teacher.server import ServerTeacher
from megatron_opd.types import Reward

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


def samplings(
    config: cfg.Config, objective: Objective | Total, stops: tuple[int, ...]
) -> tuple[Sampling, Sampling]:
    """Return how training responses and how evaluation responses are drawn."""
    r, e = config.rollout, config.eval
    longest = e.max_tokens or r.max_tokens
    listed = listed_ids(config, objective)
    return (
        Sampling(r.max_tokens, r.temperature, r.top_p, r.top_k, stops, listed),
        Sampling(longest, e.temperature, e.top_p, 0, stops),
    )


def listed_ids(config: cfg.Config, objective: Objective | Total) -> int:
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
    return make_student(
        model, parallel, config.optimizer, steps=steps, vocab_size=vocab_size, ddp=config.ddp
    )


def judges(
    config: cfg.Config, objective: Objective | Total
) -> dict[str, tuple[cfg.Frozen, Payload]]:
    """Return the sections of the judges on our ranks by their keys, and what each is to answer."""
    found: dict[str, tuple[cfg.Frozen, Payload]] = {
        cfg.key_of_teacher(name): (teacher, teacher.payload)
        for name, teacher in config.judging.items()
        if teacher.kind == "megatron"
    }
    if config.base is not None:
        ends = [build_objective(end) for end in schedule.ends(config)]
        one_token_does = not any(why for end in ends for why in end.needs_hidden(topk=False))
        found["base"] = config.base, "sampled" if one_token_does else "hidden"
    return found


def build_judges(config: cfg.Config, objective: Objective | Total, student: Student) -> Judges:
    """Build the models that judge, beside the student, which has its first weights still."""
    built: dict[str, Teacher] = {}
    asked = judges(config, objective)
    wanted = dict.fromkeys(s.parallel for s, _ in asked.values() if s.parallel is not None)
    minutes = config.parallel.timeout_minutes
    meshes = {own: mesh.another(**own.model_dump(), timeout_minutes=minutes) for own in wanted}
    for key, (section, payload) in asked.items():
        how = {
            "vocab_size": student.vocab_size,
            "offload": section.offload,
            "payload": payload,
            "k": objective.k,
            "temperature": objective.teacher_temperature,
            "chunk_tokens": objective.chunk_tokens,
        }
        if isinstance(section, cfg.Teacher) and section.weights != "file":
            built[key] = _own_teacher(config, section, student, how)
        elif section.parallel is not None:
            built[key] = _mesh_teacher(config, section, meshes[section.parallel], student, how)
        else:
            model = _frozen_model(config, section, student)
            load_hf(model, config.folder(section), student.parallel, vocab_size=student.vocab_size)
            built[key] = MegatronTeacher(model, student.parallel, **how)
    teachers: dict[str, Teacher] = {}
    for name, section in config.judging.items():
        ours = built.get(cfg.key_of_teacher(name))
        teachers[name] = ours or _served_teacher(config, section, objective.k, student)
    return Judges(teachers, built.get("base"))


def _own_teacher(
    config: cfg.Config, section: cfg.Teacher, student: Student, how: dict[str, Any]
) -> Teacher:
    """Build a teacher of the student's network: as it is, as it was, or its running mean."""
    if section.weights == "live":
        return MegatronTeacher(student.model, student.parallel, **how)
    model = _frozen_model(config, section, student)
    if section.weights == "ema":
        return EmaTeacher(model, student.model, student.parallel, rate=section.ema_rate, **how)
    copy_weights(student.model, model)
    return MegatronTeacher(model, student.parallel, **how)


def _mesh_teacher(
    config: cfg.Config,
    section: cfg.Frozen,
    own: Parallel,
    student: Student,
    how: dict[str, Any],
) -> Teacher:
    """Build a judge on a mesh of its own, and its head's rows that the loss multiplies with."""
    folder, dtype = config.folder(section), DTYPES[section.dtype or config.student.dtype]
    with own.current():
        model = build_model(folder, own, dtype=dtype, trainable=False, seed=None)
        load_hf(model, folder, own, vocab_size=student.vocab_size)
    inner, head = MegatronTeacher(model, own, **how, keeps_head=False), None
    if how["payload"] == "hidden":
        rows = padded_vocab(architecture(config.student.path).vocab_rows, student.parallel.tp)
        cut = {"padded_vocab": rows, "vocab_size": student.vocab_size}
        head = load_head(folder, student.parallel, **cut, dtype=dtype)
    return MeshTeacher(inner, student.parallel, head)


def _frozen_model(config: cfg.Config, section: cfg.Frozen, student: Student) -> Any:
    """Build a judge's network, its vocabulary cut to the student's shards; without weights."""
    rows = architecture(config.student.path).vocab_rows
    return build_model(
        config.folder(section),
        student.parallel,
        dtype=DTYPES[section.dtype or config.student.dtype],
        megatron=megatron_fields(config) if section.path is None else None,
        padded_vocab=padded_vocab(rows, student.parallel.tp),
        trainable=False,
        seed=None,
    )


def _served_teacher(config: cfg.Config, section: cfg.Teacher, k: int, student: Student) -> Teacher:
    assert section.payload != "hidden"
    how = {"vocab_size": student.vocab_size, "payload": section.payload, "k": k}
    return ServerTeacher(connect(section, config), student.parallel, **how)


def build_engines(
    config: cfg.Config, student: Student, tokenizer: Any
) -> tuple[RolloutEngine, RolloutEngine]:
    """Build what writes the training responses, and what writes those that evaluation scores."""
    dataset, section = ReplayEngine(partial(encode_response, tokenizer)), config.rollout
    engine = drawing_engine(config, student.model, student.parallel, student.vocab_size)
    if section.engine == "replay":
        return dataset, engine
    if schedule.mixes(config):
        how = {"fraction": section.data_fraction, "by": section.data_choice}
        return MixedEngine(engine, dataset, **how), engine
    return engine, engine


def drawing_engine(
    config: cfg.Config, model: Any, parallel: Parallel, vocab_size: int
) -> RolloutEngine:
    """Build what draws responses from `model`; with replay, those of evaluation alone."""
    section = config.rollout
    if section.engine == "vllm":
        return _vllm_engine(config, model, parallel, vocab_size)
    if section.engine == "vllm_server":
        server = connect(section, config)
        return ServerEngine(model, parallel, server, vocab_size=vocab_size)
    size = section.batch_size
    return MegatronEngine(model, parallel, vocab_size=vocab_size, batch_size=size)


def connect(section: cfg.Rollout | cfg.Teacher, config: cfg.Config) -> Server:
    """Return the client of the server that a section names."""
    assert section.url is not None
    return Server(
        section.url,
        in_flight=config.rollout.batch_size,
        timeout=section.timeout_s,
        retries=section.retries,
    )


def _vllm_engine(
    config: cfg.Config, model: Any, parallel: Parallel, vocab_size: int
) -> RolloutEngine:
    # takes seconds, and is not always there
    from megatron_opd.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        model,
        parallel,
        folder=config.student.path,
        vocab_size=vocab_size,
        tp=config.rollout.tp,
        batch_size=config.rollout.batch_size,
        max_length=config.longest_sequence,
        seed=request_seed(config.seed, parallel.rank),
        options=config.vllm,
    )


def build_objective(config: cfg.Config) -> Objective | Total:
    """Translate the objective and the terms, and tell the loss how the responses were drawn.

    Raises:
        ValueError: a name that is unknown, or options that exclude each other.
    """
    first, *more = (_build_loss(config, *found) for found in cfg.losses(config).items())
    # of a sum, a loss that at times asks no base, say, gets none then
    return Total((first, *more)) if more or config.schedules else first


def _build_loss(config: cfg.Config, key: str, section: cfg.Objective) -> Objective:
    drawn = config.rollout.engine != "replay"
    return Objective(
        **section.model_dump(exclude={"support", "divergence", "weights"}),
        name=key.removeprefix("terms."),
        support=_named(f"{key}.support", section.support),
        divergence=_named(f"{key}.divergence", section.divergence),
        weights={_named(f"{key}.weights", name): own for name, own in section.weights.items()},
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


def build_training_reward(config: cfg.Config) -> Reward | None:
    """Find the function that scores training responses; None: the dataset's word counts, if any."""
    name = config.reward.function
    return None if name is None else cfg.resolve("reward.function", name, REWARDS)


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
