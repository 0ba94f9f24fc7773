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

from megatron_opd import build, memory, platform, schedule
from megatron_opd.config import Config, Frozen, key_of_teacher, losses
from megatron_opd.config_rules import cautions
from megatron_opd.data import same_tokenizer, vocab_size
from megatron_opd.loss import Objective, Total
from megatron_opd.loss.fits import asked_by
from megatron_opd.metrics import check_mirrors
from megatron_opd.model import architecture, check_files, read_config
from megatron_opd.model import check_layout as check_network_layout
from megatron_opd.model.transformer import transformer_config
from megatron_opd.parallel import check_layout
from megatron_opd.reward import REWARDS
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
        """Sequences of one step on one replica."""
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
        return min(math.ceil(sequences / fit) + unfilled, sequences)

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
    for name, path in _models(config).items():
        _check_model_folder(name, Path(path))
    for section, files in (("data", config.data.prompts), ("eval", config.eval.prompts)):
        for file in files:
            if not Path(file).is_file():
                raise ValueError(f"{section}.prompts: no file '{file}'")
    _check_objective(config)
    build.build_reward(config)
    if writes:
        _check_run(config)
    warnings = [*cautions(config), *schedule.idle(config), *_without_comparison(config)]
    _stop_at(_obstacles(config), warnings, dry_run=dry_run)
    _check_ranks(config, world)
    _check_networks(config)
    _check_vllm(config)
    return warnings


def preflight(config: Config, world: int, *, dry_run: bool = False, writes: bool = True) -> Plan:
    """`check`, read tokenizers and prompts, and count the steps.

    Raises:
        ValueError: one line.
    """
    warnings = check(config, world, dry_run=dry_run, writes=writes)
    tokenizer = _check_tokenizers(config, warnings.append)
    for path in _weights(config):
        check_files(path, vocab_size=vocab_size(tokenizer))
    _stop_at(_unreachable(config, vocab_size(tokenizer)), warnings, dry_run=dry_run)
    sources, held_out = build.load_data(config, tokenizer, warnings.append)
    _check_spaces(tokenizer, next(prompt for source in sources for prompt in source))
    steps = build.count_steps(config, sum(map(len, sources)))
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
        sources=sources,
        held_out=held_out,
        warnings=warnings,
    )


def check_writer(config: Config, world: int) -> tuple[Any, int, tuple[int, ...]]:
    """Check a student that only writes, and its engine; return tokenizer, vocabulary and stop ids.

    Raises:
        ValueError: one line.
    """
    _check_model_folder("student", Path(config.student.path))
    _stop_at(_obstacles(config), [], dry_run=False)
    check_layout(world, config.parallel.tp, config.parallel.pp)
    _check_networks(config)
    _check_vllm(config)
    tokenizer = _check_tokenizers(config, lambda line: None)  # there is one: nothing differs
    size = vocab_size(tokenizer)
    check_files(config.student.path, vocab_size=size)
    _stop_at(_unreachable(config, size), [], dry_run=False)
    return tokenizer, size, _check_stop_ids(config, tokenizer, [])


def _stop_at(obstacles: Iterator[str], warnings: list[str], *, dry_run: bool) -> None:
    """Raise the first obstacle, or warn of them all where nothing is to run."""
    for obstacle in obstacles:
        if not dry_run:
            raise ValueError(obstacle)
        warnings.append(obstacle)


def _models(config: Config) -> dict[str, str]:
    """Return the directories of all models, a server's too: its tokenizer counts."""
    paths = {"student": config.student.path}
    paths |= {n: s.path for n, s in _frozen(config).items() if s.path is not None}
    return paths


def _frozen(config: Config) -> dict[str, Frozen]:
    """Return the sections of the models that are asked and never trained, by their keys."""
    teachers = {key_of_teacher(name): section for name, section in config.judging.items()}
    return {**teachers, **({"base": config.base} if config.base is not None else {})}


def _networks(config: Config) -> dict[str, str]:
    """Return the directories of the models that are built on our ranks and have their own."""
    served = {key_of_teacher(n) for n, t in config.judging.items() if t.kind == "server"}
    return {name: path for name, path in _models(config).items() if name not in served}


def _check_model_folder(name: str, path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{name}.path: no directory '{path}'")
    if not (path / "config.json").is_file():
        raise ValueError(f"{name}.path: '{path}' has no config.json, expected a Hugging Face model")
    if not any(path.glob("tokenizer*")):
        raise ValueError(f"{name}.path: '{path}' has no tokenizer files; copy them there")


def _check_objective(config: Config) -> None:
    """Check what is minimised, from the first step to the last, and that it gets what it wants."""
    ends = [build.build_objective(end) for end in schedule.ends(config)]
    for objective in (build.build_objective(config), *ends):
        _check_support(config, objective)
        _check_payloads(config, objective)
    terms = [term for objective in ends for term in objective.terms]
    _check_presence(config, terms)
    _check_drawn(config, terms)
    _check_rewards(config, terms)


def _check_support(config: Config, objective: Objective | Total) -> None:
    """Check that the engine lists the ids that a support is made of."""
    given = config.rollout.engine == "replay" or schedule.mixes(config)
    if given and "rollout_ids_CK" in objective.wants:
        raise ValueError(
            f"objective.support: got '{_listed(objective)}', which wants the ids that the "
            "engine found most likely, but the dataset's responses (rollout.engine=replay, "
            "rollout.data_fraction) have none; set student_topk"
        )
    kept = config.rollout.logprobs
    if kept not in (None, objective.k) and "rollout_ids_CK" in objective.wants:
        raise ValueError(
            f"rollout.logprobs: got {kept}, expected objective.k={objective.k}, the size of the "
            f"support '{_listed(objective)}'; leave it out"
        )
    listed, cut = build.listed_ids(config, objective), config.rollout
    vllm = config.rollout.engine in ("vllm", "vllm_server")
    if listed and vllm and (cut.top_p < 1 or cut.top_k):
        raise ValueError(
            f"rollout: got top_p={cut.top_p:g} and top_k={cut.top_k}, but the {listed} most likely "
            "ids are to come with every token (objective.support, rollout.logprobs), and vLLM "
            "lists them after cutting; cut nothing"
        )


def _listed(objective: Objective | Total) -> str:
    """Name the support that is made of the ids which the engine lists."""
    found = (term.support for term in objective.terms if "rollout_ids_CK" in term.wants)
    return next(getattr(support, "__name__", str(support)) for support in found)


def _check_payloads(config: Config, objective: Objective | Total) -> None:
    """Check that every teacher says enough."""
    for name, teacher in config.judging.items():
        payload, key = teacher.payload, f"{key_of_teacher(name)}.payload"
        if payload != "hidden":
            for obstacle in objective.needs_hidden(topk=payload == "topk"):
                raise ValueError(f"{key}: got '{payload}', but {obstacle}")
        if payload != "sampled" and objective.group_normalize != "none":
            raise ValueError(
                f"{key}: got '{payload}', expected sampled with objective.group_normalize, which "
                "compares the rewards of all tokens of a prompt before the loss looks at any"
            )


def _check_presence(config: Config, terms: list[Objective]) -> None:
    """Check that the models are there which are asked, and no others."""
    for name, there in (("teacher", bool(config.judging)), ("base", config.base is not None)):
        asking = [term for term in terms if getattr(term, f"needs_{name}")]
        if asking and not there:
            raise ValueError(
                f"{name}: missing, but {asking[0].told(asked_by(asking[0], name))} asks one; set "
                f"{name}.path, or an objective that asks none"
            )
        if there and not asking:
            why = ", ".join(term.told(asked_by(term, name)) for term in terms)
            raise ValueError(f"{name}: set, but {why} asks none; set {name}=null")


def _check_drawn(config: Config, terms: list[Objective]) -> None:
    """Check that losses of drawn tokens get them, and what tells them apart has both kinds."""
    mixed = schedule.mixes(config)
    for term in terms:
        if term.needs_drawn and (mixed or config.rollout.engine == "replay"):
            raise ValueError(
                term.told("objective.support: got 'sampled', whose ")
                + f"{term.divergence} is a mean over tokens that the student draws, but the "
                "dataset's responses (rollout.engine=replay, rollout.data_fraction) are not drawn; "
                "set student_topk or full, or in a mix the weight rollout_only"
            )
        for weight in term.token_weights:
            if "drawn_N" in weight.wants and not mixed:
                raise ValueError(
                    term.told(f"objective.weights.{weight.name}: tells drawn responses from the ")
                    + "dataset's, but all of a run are of one kind; set rollout.data_fraction"
                )


def _check_rewards(config: Config, terms: list[Objective]) -> None:
    """Check that somebody scores the responses where their rewards are wanted."""
    build.build_training_reward(config)
    asking = [term for term in terms if term.needs_reward]
    if asking and config.reward.function is None and config.rollout.engine != "replay":
        raise ValueError(
            f"reward.function: missing, but {asking[0].told(asked_by(asking[0], 'reward'))} wants "
            f"to know what a response is worth; set {', '.join(REWARDS)}, or module:function"
        )


def _without_comparison(config: Config) -> Iterator[str]:
    """Yield that every response is alone, where its advantage over others is wanted."""
    objectives = [build.build_objective(end) for end in schedule.ends(config)]
    asks = any(term.outcome_weight for objective in objectives for term in objective.terms)
    if asks and config.rollout.n == 1 and config.rollout.engine != "replay":
        yield (
            "rollout.n=1: a response has no other to be compared with, so that its advantage is "
            "its reward"
        )


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


def _has_weights(path: str) -> bool:
    return any(Path(path).glob("*.safetensors"))


def _weights(config: Config) -> Iterator[str]:
    """Yield the directories whose weights will be read, and are there."""
    if config.student.init == "hf" and _has_weights(config.student.path):
        yield config.student.path
    for name, path in _networks(config).items():
        if name != "student" and _has_weights(path):
            yield path


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
    prompt = {"data.max_prompt_tokens": config.data.max_prompt_tokens}
    response = {"rollout.max_tokens": config.rollout.max_tokens}
    _check_positions("student", config.student.path, prompt | response)
    for name, section in _frozen(config).items():
        longest = config.longest_prompt(section)
        own = {f"{name}.max_prompt_tokens": longest}
        read = prompt if longest == config.data.max_prompt_tokens else own
        _check_positions(name, config.folder(section), read | response)
    if config.eval.prompts and config.eval.max_tokens:  # only the student sees those
        longest = {"eval.max_tokens": config.eval.max_tokens}
        _check_positions("student", config.student.path, prompt | longest)
    transformer_config(
        architecture(config.student.path),
        build.megatron_fields(config),
        dtype=build.DTYPES[config.student.dtype],
        tp=tp,
        pp=pp,
        sequence_parallel=config.parallel.sequence_parallel and tp > 1,
    )


def _check_positions(name: str, path: str, tokens: dict[str, int]) -> None:
    """Check that a network reaches over all the tokens that keys of the config allow."""
    positions, total = architecture(path).max_positions, sum(tokens.values())
    if total > positions:
        told = " + ".join(f"{key}={number}" for key, number in tokens.items())
        raise ValueError(
            f"{name}.path: max_position_embeddings={positions} of '{path}', but {told} = {total}; "
            "lower one of them"
        )


def _check_tokenizers(config: Config, warn: Callable[[str], None]) -> Any:
    """Return the student's tokenizer, after comparing it with the others' and the tables."""
    tokenizers = {name: load_tokenizer(name, path) for name, path in _models(config).items()}
    student = tokenizers["student"]
    for name, section in _frozen(config).items():
        if name in tokenizers:  # else it has the student's
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
    for key, loss in losses(config).items():
        if loss.k > needed:
            raise ValueError(
                f"{key}.k: got {loss.k}, expected at most the {needed} ids of the tokenizer"
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
    for name, teacher in config.judging.items():
        theirs = set(build.stop_ids(config.folder(teacher), tokenizer)) - set(stops)
        if theirs:
            warnings.append(
                f"{key_of_teacher(name)}.path: it may end a response with {sorted(theirs)}, where "
                "the student goes on; add them to rollout.stop_token_ids"
            )
    return stops


def _check_spaces(tokenizer: Any, prompt: Prompt) -> None:
    """Refuse a tokenizer that transformers loads as another class, which drops every space."""
    if " " in prompt.text.strip() and " " not in tokenizer.decode(prompt.token_ids).strip():
        raise ValueError(
            f"student.path: the tokenizer of '{tokenizer.name_or_path}' loses the spaces of "
            f"{prompt.text[:40]!r}; check tokenizer_class in its tokenizer_config.json"
        )


def load_tokenizer(name: str, path: str) -> Any:
    """Load the tokenizer of the model that the config calls `name`.

    Raises:
        ValueError: one line, whatever is wrong with its files.
    """
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
