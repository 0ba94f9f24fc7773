"""What is wrong or too large, found before a model is loaded.

`check` reads a few small files and runs on every rank, before they meet. `preflight` adds what is
worth doing once: tokenizers, prompts, and the arithmetic of batches and memory.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd import build, memory, platform
from megatron_opd.config import Config, Frozen, cautions
from megatron_opd.data import same_tokenizer, vocab_size
from megatron_opd.metrics import check_mirrors
from megatron_opd.model import architecture, check_files, read_config
from megatron_opd.model import check_layout as check_network_layout
from megatron_opd.model.transformer import transformer_config
from megatron_opd.parallel import check_layout
from megatron_opd.rollout import vllm_options
from megatron_opd.types import Prompt


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
    prompts: list[Prompt]
    held_out: list[Prompt]  # for evaluation
    warnings: list[str]

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def sequences_per_replica(self) -> int:
        """Sequences of one step on one replica."""
        return self.config.train.prompts_per_step // self.dp * self.config.rollout.n

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step in which every response is as long as it may be."""
        return self.sequences_per_replica * self.dp * self._longest

    @property
    def microbatches(self) -> int:
        """Microbatches of such a step on one replica."""
        fit = self.config.train.microbatch_tokens // self._longest
        return math.ceil(self.sequences_per_replica / fit)

    @property
    def _longest(self) -> int:
        return self.longest_prompt + self.config.rollout.max_tokens


def check(config: Config, world: int, *, dry_run: bool = False) -> list[str]:
    """Check files, run directory, ranks and networks; return what to warn about.

    With `dry_run`, weights and a GPU may be absent: that becomes a warning.

    Raises:
        ValueError: one line.
    """
    for name, path in _models(config).items():
        _check_model_folder(name, Path(path))
    for section, files in (("data", config.data.prompts), ("eval", config.eval.prompts)):
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"{section}.prompts: no file '{file}'")
    _check_objective(config)
    build.build_reward(config)
    _check_run(config)
    warnings = cautions(config)
    _stop_at(_obstacles(config), warnings, dry_run=dry_run)
    _check_ranks(config, world)
    _check_networks(config)
    _check_vllm(config)
    return warnings


def preflight(config: Config, world: int, *, dry_run: bool = False) -> Plan:
    """`check`, read tokenizers and prompts, and count the steps.

    Raises:
        ValueError: one line.
    """
    warnings = check(config, world, dry_run=dry_run)
    tokenizer = _check_tokenizers(config, warnings.append)
    for path in _weights(config):
        check_files(path, vocab_size=vocab_size(tokenizer))
    _stop_at(_unreachable(config, vocab_size(tokenizer)), warnings, dry_run=dry_run)
    prompts, held_out = build.load_data(config, tokenizer, warnings.append)
    _check_spaces(tokenizer, prompts[0])
    steps = build.count_steps(config, len(prompts))
    if config.optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps: got {config.optimizer.warmup_steps}, expected fewer than the "
            f"{steps} steps of this run"
        )
    return Plan(
        config=config,
        world=world,
        dp=check_layout(world, config.parallel.tp, config.parallel.pp),
        steps=steps,
        tokenizer=tokenizer,
        vocab_size=vocab_size(tokenizer),
        stop_ids=_check_stop_ids(config, tokenizer, warnings),
        prompts=prompts,
        held_out=held_out,
        warnings=warnings,
    )


def _stop_at(obstacles: Iterator[str], warnings: list[str], *, dry_run: bool) -> None:
    """Raise the first obstacle, or warn of them all where nothing is to run."""
    for obstacle in obstacles:
        if not dry_run:
            raise ValueError(obstacle)
        warnings.append(obstacle)


def _models(config: Config) -> dict[str, str]:
    """Return the directories of all models, a server's too: its tokenizer counts."""
    return {"student": config.student.path, **{n: s.path for n, s in _frozen(config).items()}}


def _frozen(config: Config) -> dict[str, Frozen]:
    """Return the sections of the models that are asked and never trained."""
    sections = {"teacher": config.teacher, "base": config.base}
    return {name: section for name, section in sections.items() if section is not None}


def _networks(config: Config) -> dict[str, str]:
    """Return the directories of the models that are built on our ranks."""
    served = config.teacher is not None and config.teacher.kind == "server"
    return {n: path for n, path in _models(config).items() if not (served and n == "teacher")}


def _check_model_folder(name: str, path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{name}.path: no directory '{path}'")
    if not (path / "config.json").is_file():
        raise ValueError(f"{name}.path: '{path}' has no config.json, expected a Hugging Face model")
    if not any(path.glob("tokenizer*")):
        raise ValueError(f"{name}.path: '{path}' has no tokenizer files; copy them there")


def _check_objective(config: Config) -> None:
    """Check the objective, and that engine and teacher will give it what it wants."""
    objective = build.build_objective(config)
    if config.rollout.engine == "replay" and "rollout_ids_CK" in objective.wants:
        raise ValueError(
            f"objective.support: got '{config.objective.support}', which wants the ids that the "
            "engine found most likely, but rollout.engine=replay writes nothing; set student_topk"
        )
    kept = config.rollout.logprobs
    if kept not in (None, objective.k) and "rollout_ids_CK" in objective.wants:
        raise ValueError(
            f"rollout.logprobs: got {kept}, expected objective.k={objective.k}, the size of the "
            f"support '{config.objective.support}'; leave it out"
        )
    listed, cut = build.listed_ids(config, objective), config.rollout
    vllm = config.rollout.engine in ("vllm", "vllm_server")
    if listed and vllm and (cut.top_p < 1 or cut.top_k):
        raise ValueError(
            f"rollout: got top_p={cut.top_p:g} and top_k={cut.top_k}, but the {listed} most likely "
            "ids are to come with every token (objective.support, rollout.logprobs), and vLLM "
            "lists them after cutting; cut nothing"
        )
    payload = config.teacher.payload if config.teacher else "hidden"
    if payload != "hidden":
        for obstacle in objective.needs_hidden(topk=payload == "topk"):
            raise ValueError(f"teacher.payload: got '{payload}', but {obstacle}")


def _check_vllm(config: Config) -> None:
    """Check what vLLM is told, and that it has the student's network."""
    if config.rollout.engine != "vllm" or not vllm_options.installed():
        return
    for problem in vllm_options.wrong_options(config.vllm):
        raise ValueError(problem)
    path = config.student.path
    if platform.device().type == "cpu":
        for problem in vllm_options.unsupported_head(architecture(path).head_dim):
            raise ValueError(f"student.path: '{path}' has {problem}; use rollout.engine=megatron")
    if not read_config(path).get("architectures"):
        raise ValueError(
            f"student.path: config.json of '{path}' names no 'architectures', by which vLLM finds "
            'the network; add it, for example ["Qwen3ForCausalLM"]'
        )


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
    for name, path in _networks(config).items():
        drawn = name == "student" and config.student.init == "random"
        if not drawn and not _has_weights(path):
            yield f"{name}.path: '{path}' has no *.safetensors weights"
    if config.rollout.engine == "vllm" and not vllm_options.installed():
        yield f"rollout.engine: got 'vllm', which is not installed; {vllm_options.INSTALL}"
    for name, section in _frozen(config).items():
        if section.offload and platform.device().type == "cpu":
            yield f"{name}.offload: needs a GPU, and there is none; set {name}.offload=false"


def _unreachable(config: Config, size: int) -> Iterator[str]:
    """Yield why a server cannot do what it is for."""
    longest, teacher = config.longest_sequence, config.teacher
    try:
        if config.rollout.engine == "vllm_server":
            with closing(build.connect(config.rollout, config)) as server:
                listed = build.listed_ids(config, build.build_objective(config))
                k = listed + 1 if listed else 0  # as many as it is asked for
                server.check(max_length=longest, vocab_size=size, k=k)
                server.check_updates()
        if teacher is not None and teacher.kind == "server":
            k = config.objective.k if teacher.payload == "topk" else 0
            with closing(build.connect(teacher, config)) as server:
                server.check(max_length=longest + 1, vocab_size=size, k=k)
    except (ValueError, OSError) as problem:
        yield str(problem)


def _has_weights(path: str) -> bool:
    return any(Path(path).glob("*.safetensors"))


def _weights(config: Config) -> Iterator[str]:
    """Yield the directories whose weights will be read, and are there."""
    if config.student.init == "hf" and _has_weights(config.student.path):
        yield config.student.path
    for name, section in _frozen(config).items():
        if name in _networks(config) and _has_weights(section.path):
            yield section.path


def _check_ranks(config: Config, world: int) -> None:
    dp = check_layout(world, config.parallel.tp, config.parallel.pp)
    if config.train.prompts_per_step % dp:
        raise ValueError(
            f"train.prompts_per_step: got {config.train.prompts_per_step}, expected a multiple of "
            f"{dp}, the data-parallel replicas of {world} ranks"
        )


def _check_networks(config: Config) -> None:
    """Check that all networks are supported, divide over the ranks, and reach far enough."""
    tp, pp = config.parallel.tp, config.parallel.pp
    for path in _networks(config).values():
        check_network_layout(path, tp, pp)
    for name, path in _models(config).items():
        _check_positions(config, name, path, "rollout.max_tokens", config.rollout.max_tokens)
    if config.eval.prompts and config.eval.max_tokens:  # only the student sees those
        longest = config.eval.max_tokens
        _check_positions(config, "student", config.student.path, "eval.max_tokens", longest)
    transformer_config(
        architecture(config.student.path),
        build.megatron_fields(config),
        dtype=build.DTYPES[config.student.dtype],
        tp=tp,
        pp=pp,
        sequence_parallel=config.parallel.sequence_parallel and tp > 1,
    )


def _check_positions(config: Config, name: str, path: str, key: str, response: int) -> None:
    positions, prompt = architecture(path).max_positions, config.data.max_prompt_tokens
    if prompt + response > positions:
        raise ValueError(
            f"{name}.path: max_position_embeddings={positions} of '{path}', but "
            f"data.max_prompt_tokens={prompt} + {key}={response} = {prompt + response}; lower one "
            "of them"
        )


def _check_tokenizers(config: Config, warn: Callable[[str], None]) -> Any:
    """Return the student's tokenizer, after comparing it with the others' and the tables."""
    tokenizers = {name: _load_tokenizer(name, path) for name, path in _models(config).items()}
    student = tokenizers["student"]
    for name, section in _frozen(config).items():
        allow = section.allow_tokenizer_mismatch
        same_tokenizer(student, tokenizers[name], name=name, allow=allow, warn=warn)
    needed = vocab_size(student)
    for name, path in _models(config).items():
        rows = architecture(path).vocab_rows
        if rows < needed:
            raise ValueError(
                f"{name}.path: vocab_size={rows} of '{path}', expected at least the {needed} ids "
                "of the student's tokenizer"
            )
    if config.objective.k > needed:
        raise ValueError(
            f"objective.k: got {config.objective.k}, expected at most the {needed} ids of the "
            "tokenizer"
        )
    return student


def _check_stop_ids(config: Config, tokenizer: Any, warnings: list[str]) -> tuple[int, ...]:
    """Return the ids that end a response, after checking that there are any."""
    stops = build.stop_ids(config.student.path, tokenizer, config.rollout.stop_token_ids)
    if config.rollout.engine == "replay" and tokenizer.eos_token_id is None:
        raise ValueError(
            f"student.path: the tokenizer of '{config.student.path}' has no eos_token, with which "
            "the responses of a dataset end"
        )
    if not stops:
        raise ValueError(
            f"student.path: neither the tokenizer nor generation_config.json of "
            f"'{config.student.path}' says what ends a response; set rollout.stop_token_ids"
        )
    if config.teacher is not None:
        theirs = set(build.stop_ids(config.teacher.path, tokenizer)) - set(stops)
        if theirs:
            warnings.append(
                f"teacher.path: it may end a response with {sorted(theirs)}, where the student "
                "goes on; add them to rollout.stop_token_ids"
            )
    return stops


def _check_spaces(tokenizer: Any, prompt: Prompt) -> None:
    """Refuse a tokenizer that transformers loads as another class, which drops every space."""
    if " " in prompt.text.strip() and " " not in tokenizer.decode(prompt.token_ids).strip():
        raise ValueError(
            f"student.path: the tokenizer of '{tokenizer.name_or_path}' loses the spaces of "
            f"{prompt.text[:40]!r}; check tokenizer_class in its tokenizer_config.json"
        )


def _load_tokenizer(name: str, path: str) -> Any:
    try:
        return build.load_tokenizer(path)
    except Exception as problem:  # of what type depends on what is wrong with the files
        told = str(problem).strip().splitlines()[0]
        raise ValueError(
            f"{name}.path: no tokenizer in '{path}' that can be read: {told}"
        ) from None


def render(plan: Plan) -> str:
    """Return the plan as the table that `--dry-run` prints."""
    config, parallel = plan.config, plan.config.parallel
    objective = build.build_objective(config)
    judges = build.judges(config, objective)
    lines = [
        f"{name:<8}  {memory.count_parameters(path):,} parameters, {path}"
        for name, path in _models(config).items()
    ]
    held_out = f"; {len(plan.held_out):,} for evaluation" if plan.held_out else ""
    lines += [
        f"data      {len(plan.prompts):,} prompts, the longest {plan.longest_prompt:,} tokens"
        + held_out,
        f"ranks     {plan.world} = tp {parallel.tp} × pp {parallel.pp} × dp {plan.dp}",
        f"run       {plan.steps:,} steps of {config.train.prompts_per_step:,} prompts × "
        f"{config.rollout.n} responses, in {config.run.dir}",
        f"step      at most {plan.tokens_per_step:,} tokens; a replica has "
        f"{plan.sequences_per_replica:,} sequences in at most {plan.microbatches:,} microbatches",
        "",
        *_memory_table(memory.estimate(config, objective, judges, plan.dp)),
    ]
    return "\n".join(lines + [f"warning: {line}" for line in plan.warnings])


def _memory_table(phases: memory.Memory) -> list[str]:
    lines = ["memory of the fullest rank, estimated          GiB"]
    for phase, parts in phases.items():
        for what, size in parts.items():
            lines.append(f"  {phase:<8}  {what:<30} {size / 2**30:8.2f}")
    return [*lines, f"  {'peak':<40}  {memory.peak(phases) / 2**30:8.2f}"]
