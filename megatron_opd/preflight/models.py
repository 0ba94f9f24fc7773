"""Are the models there, supported, of one vocabulary, and do they reach far enough."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_opd import build, inputs, platform
from megatron_opd.config import Config, Frozen, Mesh, key_of_teacher, losses
from megatron_opd.model import architecture, read_config
from megatron_opd.model import check_layout as check_network_layout
from megatron_opd.model.ddp import ddp_config
from megatron_opd.model.transformer import transformer_config
from megatron_opd.rollout import vllm_options
from megatron_opd.types import Prompt
from megatron_opd.vocabulary import same_tokenizer, vocab_size


def models(config: Config) -> dict[str, str]:
    """Return the directories of all models, a server's too: its tokenizer counts."""
    paths = {"student": config.student.path}
    paths |= {n: s.path for n, s in frozen(config).items() if s.path is not None}
    return paths


def frozen(config: Config) -> dict[str, Frozen]:
    """Return the sections of the models that are asked and never trained, by their keys."""
    teachers = {key_of_teacher(name): section for name, section in config.judging.items()}
    return {**teachers, **({"base": config.base} if config.base is not None else {})}


def networks(config: Config) -> dict[str, str]:
    """Return the directories of the models that are built on our ranks and have their own."""
    served = {key_of_teacher(n) for n, t in config.judging.items() if t.kind == "server"}
    return {name: path for name, path in models(config).items() if name not in served}


def axes_of(config: Config, name: str) -> tuple[str, Mesh]:
    """Return how a model is split over the ranks, and the key of the section that says so."""
    section = frozen(config).get(name)
    if section is None or section.parallel is None:
        return "parallel", config.parallel
    return f"{name}.parallel", section.parallel


def check_model_folder(name: str, path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{name}.path: no directory '{path}'")
    if not (path / "config.json").is_file():
        raise ValueError(f"{name}.path: '{path}' has no config.json, expected a Hugging Face model")
    if not any(path.glob("tokenizer*")):
        raise ValueError(f"{name}.path: '{path}' has no tokenizer files; copy them there")


def check_vllm(config: Config) -> None:
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


def has_weights(path: str) -> bool:
    return any(Path(path).glob("*.safetensors"))


def weights(config: Config) -> Iterator[str]:
    """Yield the directories whose weights will be read, and are there."""
    if config.student.init == "hf" and has_weights(config.student.path):
        yield config.student.path
    for name, path in networks(config).items():
        if name != "student" and has_weights(path):
            yield path


def check_networks(config: Config) -> None:
    """Check that all networks are supported, divide over the ranks, and reach far enough."""
    for name, path in networks(config).items():
        key, axes = axes_of(config, name)
        check_network_layout(
            path,
            axes.tp,
            axes.pp,
            vpp=axes.vpp,
            ep=axes.ep,
            etp=axes.etp,
            sequence_parallel=axes.sequence_parallel or name != "student",
            key=key,
        )
    _check_experts(config)
    prompt = {"data.max_prompt_tokens": config.data.max_prompt_tokens}
    response = {"rollout.max_tokens": config.rollout.max_tokens}
    _check_positions("student", config.student.path, prompt | response)
    for name, section in frozen(config).items():
        longest = config.longest_prompt(section)
        own = {f"{name}.max_prompt_tokens": longest}
        read = prompt if longest == config.data.max_prompt_tokens else own
        _check_positions(name, config.folder(section), read | response)
    if config.eval.prompts and config.eval.max_tokens:  # only the student sees those
        longest = {"eval.max_tokens": config.eval.max_tokens}
        _check_positions("student", config.student.path, prompt | longest)
    axes, student = config.parallel, architecture(config.student.path)
    transformer_config(
        student,
        build.megatron_fields(config),
        dtype=build.DTYPES[config.student.dtype],
        tp=axes.tp,
        pp=axes.pp,
        vpp=axes.vpp,
        cp=axes.cp,
        ep=axes.ep if student.experts else 1,  # they may be the teacher's alone
        etp=axes.etp if student.experts else None,
        sequence_parallel=axes.sequence_parallel and axes.tp > 1,
    )
    ddp_config(config.ddp, distributed=config.optimizer.distributed)


def _check_experts(config: Config) -> None:
    """Refuse axes of experts on a mesh where no model has any."""
    axes, found = config.parallel, False
    for name, path in networks(config).items():
        key, _ = axes_of(config, name)
        found |= key == "parallel" and architecture(path).experts is not None
    for name, size in (("ep", axes.ep > 1), ("etp", axes.etp is not None)):
        if size and not found:
            raise ValueError(
                f"parallel.{name}: got {getattr(axes, name)}, but no model on this mesh has "
                "experts; leave it out"
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


def check_tokenizers(config: Config, warn: Callable[[str], None]) -> Any:
    """Return the student's tokenizer, after comparing it with the others' and the tables."""
    tokenizers = {name: load_tokenizer(name, path) for name, path in models(config).items()}
    student = tokenizers["student"]
    for name, section in frozen(config).items():
        if name in tokenizers:  # else it has the student's
            allow = section.allow_tokenizer_mismatch
            same_tokenizer(student, tokenizers[name], name=name, allow=allow, warn=warn)
    needed = vocab_size(student)
    for name, path in models(config).items():
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


def check_stop_ids(config: Config, tokenizer: Any, warnings: list[str]) -> tuple[int, ...]:
    """Return the ids that end a response, after checking that there are any."""
    stops = inputs.stop_ids(config.student.path, tokenizer, config.rollout.stop_token_ids)
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
        theirs = set(inputs.stop_ids(config.folder(teacher), tokenizer)) - set(stops)
        if theirs:
            warnings.append(
                f"{key_of_teacher(name)}.path: it may end a response with {sorted(theirs)}, where "
                "the student goes on; add them to rollout.stop_token_ids"
            )
    return stops


def check_spaces(tokenizer: Any, prompt: Prompt) -> None:
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
        return inputs.load_tokenizer(path)
    except Exception as problem:  # of what type depends on what is wrong with the files
        told = str(problem).strip().splitlines()[0]
        raise ValueError(
            f"{name}.path: no tokenizer in '{path}' that can be read: {told}"
        ) from None
