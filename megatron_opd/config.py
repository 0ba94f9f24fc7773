"""Every knob, typed and frozen, with its help sentence; the checks across sections.

The sentence under a field is what `--help` prints for it. A value is checked exactly once, when the
file is read: code that receives a section trusts it.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Dtype = Literal["bfloat16", "float32"]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Student(Section):
    """The model that learns."""

    path: str
    """Hugging Face directory: config.json, tokenizer and safetensors weights."""
    init: Literal["hf", "random"] = "hf"
    """Initial weights: the directory's (hf), or random ones for its config.json."""
    dtype: Dtype = "bfloat16"
    """Type of the weights in forward and backward; the optimizer's copy is always float32."""


class Teacher(Section):
    """The frozen model that judges; not needed when the divergence is cross_entropy."""

    path: str
    """Hugging Face directory: config.json, tokenizer and safetensors weights."""
    dtype: Dtype | None = None
    """Type of the weights; null: the student's."""
    offload: bool = False
    """Keep the weights in host memory between uses; needs a GPU."""
    allow_tokenizer_mismatch: bool = False
    """Go on although some token ids mean different tokens to student and teacher."""


class Parallel(Section):
    """How one model copy is split over ranks; what is left over is data parallel."""

    tp: Positive = 1
    """Tensor-parallel size: ranks that share every layer."""
    pp: Positive = 1
    """Pipeline-parallel size: ranks that each hold a run of layers."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the tokens; needs tp > 1."""
    timeout_minutes: Positive = 30
    """Minutes after which a collective that some rank never joined is an error."""


class Data(Section):
    """Where prompts come from and how they become tokens."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parquet or JSON-lines files, read one after the other as one list."""
    template: Literal["chat", "none"] = "chat"
    """Render prompts with the tokenizer's chat template (chat), or take the text as is (none)."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, for example {enable_thinking: false}."""
    max_prompt_tokens: Positive = 1024
    """Longest prompt, in tokens of the rendered template."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with longer prompts: refuse to start, or leave them out and say how many."""
    shuffle: bool = False
    """Draw a new order every epoch, from the seed; false: the order of the files."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string or a list of {role, content}; dots enter nested columns."""
    answer_key: str = "answer"
    """Column with the true answer; where absent, reward_model.ground_truth is used."""
    response_key: str = "response"
    """Column with a response, for the replay engine."""


class Rollout(Section):
    """How responses are written."""

    engine: Literal["megatron", "replay"] = "megatron"
    """Who writes: the student itself (megatron), or the dataset (replay)."""
    n: Positive = 4
    """Responses per prompt."""
    max_tokens: Positive = 7168
    """Longest response, in tokens, including the end token."""
    temperature: NonNegative = 1.0
    """Sampling temperature."""
    top_p: Probability = 1.0
    """Sample from the smallest set of tokens with this total probability; 1: from all."""
    top_k: Natural = 0
    """Sample from this many most likely tokens; 0: from all."""
    stop_token_ids: tuple[Natural, ...] = ()
    """Token ids that end a response, besides the tokenizer's and generation_config's."""
    batch_size: Positive = 64
    """Sequences that one replica decodes together."""


class Objective(Section):
    """What the student minimises: a divergence between student and teacher over a support."""

    support: Literal["sampled", "student_topk", "full"] = "student_topk"
    """Vocabulary entries compared: the sampled token, the student's k most likely, or all."""
    divergence: Literal["reverse_kl", "cross_entropy"] = "reverse_kl"
    """reverse_kl: KL(student ‖ teacher); cross_entropy: −log student(response), no teacher."""
    k: Positive = 16
    """Entries of the student_topk support (renormalised in both models) and of overlap metrics."""
    student_temperature: Temperature = 1.0
    """Divides the student's logits in the loss."""
    teacher_temperature: Temperature = 1.0
    """Divides the teacher's logits in the loss."""
    chunk_tokens: Positive = 1024
    """Tokens whose logits exist at the same time; smaller needs less memory."""


class Optimizer(Section):
    """AdamW on float32 weights."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Where a linear or cosine schedule ends, one step after the last."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay; norms and biases have none."""
    clip_norm: NonNegative = 1.0
    """Scale gradients down to this global norm; 0: never."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up, until the last step."""
    distributed: bool = True
    """Share the optimizer states out over the data-parallel ranks."""


class Train(Section):
    """How much is trained, and in what pieces."""

    prompts_per_step: Positive = 64
    """Prompts of one optimizer update, over all replicas."""
    epochs: Positive = 1
    """Passes over the prompts; what is left at the end and does not fill a step is not used."""
    steps: Positive | None = None
    """Number of updates, whatever the epochs; null: as many as the epochs give."""
    microbatch_tokens: Positive = 16384
    """Packed tokens of one forward and backward on one replica."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activations computed again in the backward: none, attention's (selective), or all (full)."""


class Eval(Section):
    """Sampling accuracy on held-out prompts."""

    prompts: tuple[str, ...] = ()
    """Parquet or JSON-lines files; empty: no evaluation."""
    every: Natural = 0
    """Steps between evaluations; 0: none during training."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    n: Positive = 1
    """Responses per prompt; the accuracy is their mean."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0: the most likely token."""
    top_p: Probability = 1.0
    """Sample from the smallest set of tokens with this total probability; 1: from all."""
    max_tokens: Positive | None = None
    """Longest response, in tokens; null: rollout.max_tokens."""
    reward: str = "exact_match"
    """What scores a response: a built-in name or module:function."""


class Run(Section):
    """What is kept, and where."""

    dir: str = "runs/opd"
    """Directory of this run; an existing one is refused unless resuming."""
    print_every: Positive = 1
    """Steps between console lines; every step is in metrics.jsonl."""
    save_every: Natural = 0
    """Steps between checkpoints; 0: none."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    resume: bool = False
    """Go on from the newest checkpoint in run.dir."""
    export: bool = True
    """Write the trained student as a Hugging Face directory at the end."""
    tensorboard: bool = False
    """Mirror the metrics to TensorBoard, in run.dir."""
    wandb: str | None = None
    """Weights & Biases project to mirror the metrics to; null: none."""
    save_rollouts_every: Natural = 0
    """Steps between files of rollouts as text; 0: none."""


class Config(Section):
    """On-policy distillation: one run."""

    seed: Natural = 0
    """Seed of the data order, the sampling, and random weights."""
    student: Student
    teacher: Teacher | None = None
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    eval: Eval = Eval()
    run: Run = Run()
    megatron: dict[str, Any] = {}
    """Fields of Megatron-Core's TransformerConfig, passed on to the student's network."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for wrong, line in _contradictions(self):
            if wrong:
                raise ValueError(line)
        return self


def _contradictions(c: Config) -> Iterable[tuple[bool, str]]:
    """Yield (is it so, what to tell the user) for values that exclude each other."""
    replay, hard = c.rollout.engine == "replay", c.objective.divergence == "cross_entropy"
    yield (
        c.teacher is None and not hard,
        f"teacher: missing, but divergence={c.objective.divergence} compares with one; set "
        "teacher.path, or objective.divergence=cross_entropy with objective.support=sampled",
    )
    yield (
        c.teacher is not None and hard,
        "teacher: set, but objective.divergence=cross_entropy uses none; set teacher=null",
    )
    yield (
        hard and c.objective.support != "sampled",
        f"objective.support: got '{c.objective.support}', expected 'sampled' with "
        "objective.divergence=cross_entropy",
    )
    yield (
        c.objective.support == "student_topk" and c.objective.k < 2,
        "objective.k: got 1, expected 2 or more: renormalised over one token, student and teacher "
        "both give it probability 1 and the gradient is zero; for one token a position set "
        "objective.support=sampled",
    )
    yield (
        replay and not hard and c.objective.support == "sampled",
        "objective.support: got 'sampled', which estimates reverse_kl from tokens that the student "
        "draws, but rollout.engine=replay draws none; set student_topk or full",
    )
    yield (
        not replay and c.rollout.temperature == 0,
        "rollout.temperature: got 0, expected more than 0: the loss is a mean over what the "
        "student samples, and greedy responses are no sample of it",
    )
    yield (
        replay and c.rollout.n > 1,
        f"rollout.n: got {c.rollout.n}, expected 1 with rollout.engine=replay: a row has one "
        "response",
    )
    longest = c.data.max_prompt_tokens + c.rollout.max_tokens
    yield (
        c.train.microbatch_tokens < longest,
        f"train.microbatch_tokens: got {c.train.microbatch_tokens}, expected at least {longest} = "
        "data.max_prompt_tokens + rollout.max_tokens, so that the longest sequence fits",
    )
    yield (
        c.optimizer.min_lr > c.optimizer.lr,
        f"optimizer.min_lr: got {c.optimizer.min_lr:g}, expected at most optimizer.lr="
        f"{c.optimizer.lr:g}",
    )
    yield (
        bool(c.eval.every) and not c.eval.prompts,
        "eval.prompts: empty, but eval.every asks for evaluations; name a file",
    )
    yield (
        c.eval.n > 1 and c.eval.temperature == 0,
        f"eval.n: got {c.eval.n}, expected 1 with eval.temperature=0: greedy responses to one "
        "prompt are all the same",
    )


def cautions(c: Config) -> list[str]:
    """Name options that have no effect with the others, and pairs that are seldom meant."""
    replay, hard = c.rollout.engine == "replay", c.objective.divergence == "cross_entropy"
    defaults = {name: kind.model_fields for name, kind in sections().items()}
    graded = bool(c.eval.prompts)
    idle = [
        (c.data.template == "none", "data", ("chat_template_kwargs",)),
        (replay, "rollout", ("temperature", "top_p", "top_k")),
        (replay and not graded, "rollout", ("stop_token_ids", "batch_size")),
        (hard, "objective", ("k", "teacher_temperature")),
        (c.optimizer.schedule == "constant", "optimizer", ("min_lr",)),
        (c.parallel.tp == 1, "parallel", ("sequence_parallel",)),
        (not c.run.save_every, "run", ("keep",)),
        (not graded, "eval", ("n", "temperature", "top_p", "max_tokens", "reward")),
        (c.eval.temperature == 0, "eval", ("top_p",)),
        (c.train.steps is not None, "train", ("epochs",)),
    ]
    lines = [
        f"{section}.{name}: has no effect in this config"
        for without_effect, section, names in idle
        for name in names
        if without_effect and getattr(getattr(c, section), name) != defaults[section][name].default
    ]
    if not replay and (c.rollout.top_p < 1 or c.rollout.top_k):
        lines.append(
            f"rollout.top_p={c.rollout.top_p:g}, rollout.top_k={c.rollout.top_k}: responses come "
            "from a truncated distribution, the loss is over the whole one"
        )
    if c.objective.support == "sampled" and not hard and not replay:
        drawn, scored = c.rollout.temperature, c.objective.student_temperature
        if drawn != scored:
            lines.append(
                f"rollout.temperature={drawn:g}, objective.student_temperature={scored:g}: the "
                "sampled-token estimate is unbiased only when they are equal"
            )
    return lines


def to_yaml(config: Config) -> str:
    """Write out every key, so that the text loads to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def sections() -> dict[str, type[Section]]:
    """Return the sections of a config by name, in order; the first, "", is the top level."""
    found: dict[str, type[Section]] = {"": Config}
    for name, field in Config.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                found[name] = kind
    return found


def differences(one: Config, other: Config) -> Iterable[str]:
    """Yield a line for every key with another value, but where to write and whether to resume."""
    for section, kind in sections().items():
        mine, theirs = (getattr(c, section) if section else c for c in (one, other))
        if section == "run":
            continue
        for key in kind.model_fields:
            if key in sections():
                continue
            values = [getattr(x, key, None) for x in (mine, theirs)]
            if values[0] != values[1]:
                yield f"{section}.{key} was {values[0]!r}, is {values[1]!r}".lstrip(".")


def resolve(key: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return the built-in that config key `key` calls `name`, else the attribute of "module:attr".

    Raises:
        ValueError: neither exists; names the built-ins.
    """
    if name in table:
        return table[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key}: got '{name}' ({error}), expected one of {', '.join(table)}, or module:attr"
        ) from None
