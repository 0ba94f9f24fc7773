"""What a run will do and need; and everything that is checked before it does."""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd import build, inputs, memory, platform, schedule
from megatron_opd.config import Config
from megatron_opd.config_rules import cautions
from megatron_opd.metrics import check_mirrors
from megatron_opd.model import check_files
from megatron_opd.parallel import check_layout
from megatron_opd.preflight.losses import check_objective, larger_payloads, without_comparison
from megatron_opd.preflight.models import (
    axes_of,
    check_model_folder,
    check_networks,
    check_spaces,
    check_stop_ids,
    check_tokenizers,
    check_vllm,
    frozen,
    has_weights,
    models,
    networks,
    weights,
)
from megatron_opd.rollout import vllm_options
from megatron_opd.types import Prompt
from megatron_opd.vocabulary import vocab_size


@dataclass(frozen=True)
class Plan:
    """What a run will do, and what it will need."""

    config: Config
    world: int
    dp: int
    steps: int
    tokenizer: Any  # the student's
    vocab_size: int  # ids that it uses: what is sampled and compared
    stop_ids: tuple[int, ...]
    sources: list[list[Prompt]]  # of each file
    held_out: list[Prompt]  # for evaluation
    warnings: list[str]

    @property
    def prompts(self) -> list[Prompt]:
        """All files' prompts, as one list."""
        return [prompt for source in self.sources for prompt in source]

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def sequences_per_replica(self) -> int:
        """Sequences of one step on one replica; of unlike lengths, some have more and some less."""
        return self.config.train.prompts_per_step // self.dp * self.config.rollout.n

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step in which every response is as long as it may be."""
        return self.sequences_per_replica * self.dp * self._longest

    @property
    def microbatches(self) -> int:
        """Microbatches of such a step on one replica."""
        judged = [len(prompt.teacher_token_ids or ()) for prompt in self.prompts]
        longest = max(self.longest_prompt, *judged) + self.config.rollout.max_tokens
        fit = self.config.train.microbatch_tokens // longest
        unfilled = max(len(self.config.teachers) - 1, 0)  # each has a last one of its own
        sequences = self.sequences_per_replica
        needed = min(math.ceil(sequences / fit) + unfilled, sequences)
        step = self.config.parallel.pp if self.config.parallel.vpp > 1 else 1
        return math.ceil(needed / step) * step

    @property
    def _longest(self) -> int:
        return self.longest_prompt + self.config.rollout.max_tokens


def check(config: Config, world: int, *, dry_run: bool = False, writes: bool = True) -> list[str]:
    """Check files, run directory, ranks and networks; return what to warn about.

    With `dry_run`, weights and a GPU may be absent: that becomes a warning. Without `writes`,
    nothing will be trained, and the run directory may be anything.

    Raises:
        ValueError: one line.
    """
    for name, path in models(config).items():
        check_model_folder(name, Path(path))
    for section, files in (("data", config.data.prompts), ("eval", config.eval.prompts)):
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"{section}.prompts: no file '{file}'")
    check_objective(config)
    build.build_reward(config)
    if writes:
        _check_run(config)
    warnings = [*cautions(config), *schedule.idle(config), *without_comparison(config)]
    warnings += larger_payloads(config)
    _stop_at(_obstacles(config), warnings, dry_run=dry_run)
    _check_ranks(config, world)
    check_networks(config)
    check_vllm(config)
    return warnings


def preflight(config: Config, world: int, *, dry_run: bool = False, writes: bool = True) -> Plan:
    """`check`, read tokenizers and prompts, and count the steps.

    Raises:
        ValueError: one line.
    """
    warnings = check(config, world, dry_run=dry_run, writes=writes)
    tokenizer = check_tokenizers(config, warnings.append)
    for path in weights(config):
        check_files(path, vocab_size=vocab_size(tokenizer))
    _stop_at(_unreachable(config, vocab_size(tokenizer)), warnings, dry_run=dry_run)
    sources, held_out = inputs.load_data(config, tokenizer, warnings.append)
    check_spaces(tokenizer, next(prompt for source in sources for prompt in source))
    steps = inputs.count_steps(config, sum(map(len, sources)))
    if config.optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps: got {config.optimizer.warmup_steps}, expected fewer than the "
            f"{steps} steps of this run"
        )
    return Plan(
        config=config,
        world=world,
        dp=_replicas(config, world),
        steps=steps,
        tokenizer=tokenizer,
        vocab_size=vocab_size(tokenizer),
        stop_ids=check_stop_ids(config, tokenizer, warnings),
        sources=sources,
        held_out=held_out,
        warnings=warnings,
    )


def check_writer(config: Config, world: int) -> tuple[Any, int, tuple[int, ...]]:
    """Check a student that only writes, and its engine; return tokenizer, vocabulary and stop ids.

    Raises:
        ValueError: one line.
    """
    check_model_folder("student", Path(config.student.path))
    _stop_at(_obstacles(config), [], dry_run=False)
    _replicas(config, world)
    check_networks(config)
    check_vllm(config)
    tokenizer = check_tokenizers(config, lambda line: None)  # there is one: nothing differs
    size = vocab_size(tokenizer)
    check_files(config.student.path, vocab_size=size)
    _stop_at(_unreachable(config, size), [], dry_run=False)
    return tokenizer, size, check_stop_ids(config, tokenizer, [])


def _stop_at(obstacles: Iterator[str], warnings: list[str], *, dry_run: bool) -> None:
    """Raise the first obstacle, or warn of them all where nothing is to run."""
    for obstacle in obstacles:
        if not dry_run:
            raise ValueError(obstacle)
        warnings.append(obstacle)


def _check_run(config: Config) -> None:
    folder = Path(config.run.dir)
    exists = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if exists and not config.run.resume:
        raise ValueError(
            f"run.dir: '{folder}' exists; set run.resume=true or choose another run.dir"
        )
    if config.run.resume and not any(folder.glob("checkpoints/step_*")):
        raise ValueError(
            f"run.resume: no checkpoint in '{folder}' to go on from; check run.dir, or start a new "
            "run with run.save_every"
        )
    check_mirrors(tensorboard=config.run.tensorboard, wandb=config.run.wandb)


def _obstacles(config: Config) -> Iterator[str]:
    """Yield what stops a run, but not the planning of one that happens elsewhere."""
    for name, path in networks(config).items():
        drawn = name == "student" and config.student.init == "random"
        if not drawn and not has_weights(path):
            yield f"{name}.path: '{path}' has no *.safetensors weights"
    if config.rollout.engine == "vllm" and not vllm_options.installed():
        yield f"rollout.engine: got 'vllm', which is not installed; {vllm_options.INSTALL}"
    sections = {"optimizer": config.optimizer, **frozen(config)}
    for name, section in sections.items():
        if section.offload and platform.device().type == "cpu":
            yield f"{name}.offload: needs a GPU, and there is none; set {name}.offload=false"


def _unreachable(config: Config, size: int) -> Iterator[str]:
    """Yield why a server cannot do what it is for."""
    longest = config.longest_sequence
    try:
        if config.rollout.engine == "vllm_server":
            with closing(build.connect(config.rollout, config)) as server:
                listed = build.listed_ids(config, build.build_objective(config))
                k = listed + 1 if listed else 0  # as many as it is asked for
                server.check(max_length=longest, vocab_size=size, k=k)
                server.check_updates()
        for teacher in config.judging.values():
            if teacher.kind == "server":
                k = build.build_objective(config).k if teacher.payload == "topk" else 0
                read = config.longest_prompt(teacher) + config.rollout.max_tokens
                with closing(build.connect(teacher, config)) as server:
                    server.check(max_length=read + 1, vocab_size=size, k=k)
    except (ValueError, OSError) as problem:
        yield str(problem)


def _replicas(config: Config, world: int) -> int:
    axes = config.parallel
    return check_layout(world, axes.tp, axes.pp, cp=axes.cp, ep=axes.ep, etp=axes.etp)


def _check_ranks(config: Config, world: int) -> None:
    dp = _replicas(config, world)
    if config.train.prompts_per_step % dp:
        raise ValueError(
            f"train.prompts_per_step: got {config.train.prompts_per_step}, expected a multiple of "
            f"{dp}, the data-parallel replicas of {world} ranks"
        )
    for name, section in frozen(config).items():
        if section.parallel is not None:
            key, own = axes_of(config, name)
            check_layout(world, own.tp, own.pp, ep=own.ep, etp=own.etp, key=key)


def render(plan: Plan, device: str = "cuda") -> str:
    """Return the plan as the table that `--dry-run` prints, with the memory on a CPU or a GPU."""
    config, parallel = plan.config, plan.config.parallel
    objective = build.build_objective(config)
    judges = build.judges(config, objective)
    lines = [
        f"{name:<8}  {memory.count_parameters(path):,} parameters, {path}"
        for name, path in models(config).items()
    ]
    held_out = f"; {len(plan.held_out):,} for evaluation" if plan.held_out else ""
    lines += [
        f"data      {len(plan.prompts):,} prompts, the longest {plan.longest_prompt:,} tokens"
        + held_out,
        f"ranks     {plan.world} = {parallel.told} × dp {plan.dp}",
        *_own_meshes(plan),
        f"run       {plan.steps:,} steps of {config.train.prompts_per_step:,} prompts × "
        f"{config.rollout.n} responses, in {config.run.dir}",
        f"step      at most {plan.tokens_per_step:,} tokens: on a replica about "
        f"{plan.sequences_per_replica:,} sequences in {plan.microbatches:,} microbatches",
        "",
        *_memory_table(memory.estimate(config, objective, judges, plan.dp, device=device), device),
    ]
    return "\n".join(lines + [f"warning: {line}" for line in plan.warnings])


def _own_meshes(plan: Plan) -> Iterator[str]:
    """Yield a line for every judge that is split otherwise than the student."""
    for name in frozen(plan.config):
        key, own = axes_of(plan.config, name)
        if own is not plan.config.parallel:
            copies = plan.world // (own.tp * own.pp)
            yield f"          {key}: {own.told} × {copies} copies"


def _memory_table(phases: memory.Memory, device: str) -> list[str]:
    peak, where = memory.peak(phases), {"cpu": "a CPU", "cuda": "a GPU"}[device]
    unit, size = ("GiB", 2**30) if peak >= 2**29 else ("MiB", 2**20)
    lines = [f"{f'memory of the fullest rank on {where}, estimated':<46}  {unit}"]
    for phase, parts in phases.items():
        for what, need in parts.items():
            lines.append(f"  {phase:<8}  {what:<30} {need / size:8.2f}")
    return [*lines, f"  {'peak':<40}  {peak / size:8.2f}"]
