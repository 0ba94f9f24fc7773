"""Every knob, typed and frozen, with its help sentence.

The sentence under a field is what `--help` prints for it. A value is checked exactly once, when the
file is read: code that receives a section trusts it.
"""

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0)]
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


class Mesh(Section):
    """How a copy of a frozen model is split over ranks; what is left over holds more copies."""

    tp: Positive = 1
    """Tensor-parallel size: ranks that share every layer."""
    pp: Positive = 1
    """Pipeline-parallel size: ranks that each hold a run of layers."""
    vpp: Positive = 1
    """Runs of layers on each pipeline stage: more of them wait less for each other; pp > 1."""
    ep: Positive = 1
    """Expert-parallel size: ranks that each hold some of the experts, across the replicas."""
    etp: Positive | None = None
    """Tensor-parallel size inside an expert; null: tp."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the tokens; needs tp > 1."""

    @property
    def told(self) -> str:
        """Name the axes in a line; of those beyond tp and pp, the ones that are in use."""
        used = [f"{axis} {size}" for axis, size in self._more_axes().items() if size > 1]
        return " × ".join([f"tp {self.tp}", f"pp {self.pp}", *used])

    def _more_axes(self) -> dict[str, int]:
        return {"vpp": self.vpp, "ep": self.ep, "etp": self.etp or 1}


class Frozen(Section):
    """A model that is asked and never trained."""

    path: str | None = None
    """Hugging Face directory: config.json, tokenizer and safetensors weights."""
    dtype: Dtype | None = None
    """Type of the weights; null: the student's."""
    offload: bool = False
    """Keep the weights in host memory between uses; needs a GPU."""
    allow_tokenizer_mismatch: bool = False
    """Go on although some token ids mean different tokens to student and this model."""
    parallel: Mesh | None = None
    """Its own tp, pp, vpp, ep, etp and sequence_parallel on the same ranks; null: the student's."""


class Teacher(Frozen):
    """The model that judges; not needed when the divergence is cross_entropy."""

    weights: Literal["file", "student", "ema", "live"] = "file"
    """Whose: path's (file), the student's at the start, their running mean, or those of now."""
    ema_rate: Probability = 0.05
    """Share of the student's weights that enters the running mean of weights=ema every step."""
    template: str | None = None
    """What it reads for the user's message: opsd, sdft, a file with {message}; null: the same."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template where it reads; null: those of data.chat_template_kwargs."""
    max_prompt_tokens: Positive | None = None
    """Longest prompt of one that reads another than the student; null: data.max_prompt_tokens."""
    payload: Literal["hidden", "topk", "sampled"] = "hidden"
    """What is kept a token: a hidden state (any support), its top k, the sampled token's logp."""
    kind: Literal["megatron", "server"] = "megatron"
    """Where it runs: on the student's ranks (megatron), or behind a vLLM server."""
    url: str | None = None
    """Address of the server of kind=server, for example http://10.0.0.7:8000."""
    timeout_s: Positive = 600
    """Seconds to wait for an answer of the server."""
    retries: Natural = 3
    """Times that a failed or wrong answer is asked for again before the run stops."""

    @property
    def reads_own_prompt(self) -> bool:
        """Whether it judges responses after another prompt than the student's."""
        return self.template is not None or self.chat_template_kwargs is not None


class Base(Frozen):
    """What the teacher once was: the model that objective.extrapolation starts from."""


class Parallel(Mesh):
    """How one model copy is split over ranks; what is left over is data parallel."""

    cp: Positive = 1
    """Context-parallel size: ranks that each hold a part of every sequence."""
    timeout_minutes: Positive = 30
    """Minutes after which a collective that some rank never joined is an error."""

    def _more_axes(self) -> dict[str, int]:
        return {"cp": self.cp, **super()._more_axes()}


class Data(Section):
    """Where prompts come from and how they become tokens."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parquet or JSON-lines files, read one after the other as one list."""
    weights: Annotated[tuple[Share, ...], Field(min_length=1)] | None = None
    """Shares of the files in every step's prompts, [0.7, 0.3] say; null: one list, no shares."""
    schedule: Literal["all", "fixed", "one_per_batch", "one_total"] = "all"
    """Prompts of a step: the next, the first ones again, copies of the next, or of the first."""
    template: str = "none"
    """Words around a question: none (as in the file), dapo, boxed, or a file with {question}."""
    chat_template: str = "tokenizer"
    """Chat template: the tokenizer's, the text as is (none), or a Jinja file."""
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
    reward_key: str = "reward"
    """Column with the reward of that response, a number."""
    id_key: str | None = "id"
    """Column that no two rows of a file share; where absent, extra_info.index; null: no check."""
    teacher_key: str = "teacher"
    """Column with the name of the teacher that judges the row."""


class Rollout(Section):
    """How responses are written."""

    engine: Literal["megatron", "vllm", "vllm_server", "replay"] = "megatron"
    """Who writes: the student itself (megatron), vLLM beside it or elsewhere, the data (replay)."""
    tp: Positive = 1
    """Ranks of one engine=vllm; divides parallel.tp."""
    url: str | None = None
    """Address of the server of engine=vllm_server, on this host: http://127.0.0.1:8000, say."""
    timeout_s: Positive = 600
    """Seconds to wait for a response of the server."""
    retries: Natural = 3
    """Times that a failed or wrong response is asked for again before the run stops."""
    async_depth: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps that the server writes ahead: 1 writes the next step's responses during this one."""
    n: Positive = 4
    """Responses per prompt."""
    data_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the prompts that the dataset's response answers, once each (GKD's 1 − λ)."""
    data_choice: Literal["prompt", "step"] = "prompt"
    """Throw the coin of data_fraction for every prompt, or once for all prompts of a step."""
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
    """Sequences that one engine decodes together, or that one server is asked for at a time."""
    mask_truncated: bool = False
    """Do not supervise responses that were cut at max_tokens."""
    mask_format: str | None = None
    """Regular expression that a response must contain to be supervised; null: any will do."""
    logprobs: Natural | None = None
    """Most likely ids and their log-probabilities kept a token; null: what the loss wants."""
    correction: Literal["none", "tis", "icepop", "mask"] = "none"
    """Token weight by trainer π and engine μ: min(π/μ, high); in [low, high] π/μ, or 1, else 0."""
    correction_low: float = 0.5
    """Lowest π/μ that icepop and mask keep."""
    correction_high: float = 2.0
    """Highest π/μ that icepop and mask keep, and at which tis cuts it off."""

    @field_validator("mask_format")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(
                f"rollout.mask_format: got '{pattern}', expected a regular expression: {error}"
            ) from None
        return pattern


class Objective(Section):
    """What the student minimises: a divergence between student and teacher over a support."""

    # what values these may have, alone and together, is `loss.Objective`'s to say

    support: str = "student_topk"
    """Vocabulary entries that are compared: a built-in name (see the README) or module:function."""
    divergence: str = "reverse_kl"
    """reverse_kl, forward_kl, jsd, skew_kl, module:function; no teacher: cross_entropy, outcome."""
    k: int = 16
    """Entries of a top-k support, and of the metrics of overlap."""
    append_sampled: bool = False
    """Add the sampled token to a top-k support that it is not in."""
    normalize: Literal["support", "vocab"] = "support"
    """Where probabilities on a top-k support add up to 1: on the support, or on the vocabulary."""
    tail: bool = False
    """Count all mass outside a top-k support as one more entry; wants normalize=vocab."""
    jsd_beta: float = 0.5
    """Weight β of the teacher in jsd's mixture βq + (1−β)p."""
    jsd_rescale: bool = False
    """Divide jsd by β(1−β): β = 0 is then forward_kl, and β = 1 reverse_kl."""
    skew_alpha: float = 0.1
    """Weight α of the teacher in skew_kl, KL(q ‖ αq + (1−α)p)."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How reverse_kl is estimated from the sampled token, with d = log p − log q: d, d²/2, k3."""
    form: Literal["direct", "policy_gradient"] = "direct"
    """Differentiate the divergence, or reward tokens with its negative."""
    reward_weight: Literal["student_p", "teacher_p", "none"] = "student_p"
    """What weighs the rewards of a support's entries in a policy gradient."""
    reward_weight_normalize: bool = True
    """Make these weights add up to 1 on the support."""
    center_on_support: bool = False
    """Subtract the weighted mean of the support's rewards from each."""
    baseline: Literal["none", "kl", "topk_kl", "mean"] = "none"
    """Subtracted from a policy gradient's cost: KL(p ‖ q), the same on the top k, or the mean."""
    reward_floor: float | None = None
    """Lowest reward; null: none."""
    reward_cap: float | None = None
    """Highest reward; null: none."""
    discount: float = 0.0
    """Factor γ of later tokens' rewards in a token's own; sampled policy gradient only."""
    group_normalize: Literal["none", "mean", "std"] = "none"
    """Subtract from a sampled token's reward the mean over its prompt's tokens; std: divide too."""
    outcome: float = 0.0
    """Weight of the response's advantage (reward section) beside a sampled token's own reward."""
    clip_low: float | None = None
    """PPO: no gain below π/μ = 1 − clip_low, of a sampled policy gradient; null: no bound."""
    clip_high: float | None = None
    """PPO: no gain above π/μ = 1 + clip_high; null: no bound."""
    dual_clip: float | None = None
    """PPO: a negative advantage counts at most this many times; null: no bound."""
    extrapolation: float = 1.0
    """λ of the target λ log q + (1−λ) log b, with a base model b; 1: the teacher alone."""
    veto: float = 0.0
    """β of the target q · p^β: what the student finds unlikely is not asked of it; 0: off."""
    student_temperature: float = 1.0
    """Divides the student's logits in the loss."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits in the loss, and the base's."""
    temperature_squared: bool = False
    """Multiply the loss by the product of both temperatures, which keeps its gradient's size."""
    weights: dict[str, dict[str, Any]] = {}
    """Factors of each token's loss: a built-in name or module:function, and its options."""
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """Mean over all tokens, or over responses, of each one's sum, mean, or sum / fixed_length."""
    fixed_length: int | None = None
    """Tokens by which seq-mean-token-sum-norm divides the sum of a response."""
    chunk_tokens: int | None = None
    """Tokens whose logits exist at the same time; null: as many as fit a fixed memory."""
    weight: float = 1.0
    """Factor of this loss in the sum of the objective and the terms."""


class Reward(Section):
    """What a whole training response is worth, and its advantage over its prompt's others."""

    function: str | None = None
    """What scores a response: a built-in name or module:function; null: a dataset's own reward."""
    normalize: Literal["std", "mean"] = "std"
    """Advantage R − mean of the prompt's responses (mean: Dr.GRPO), over their deviation (std)."""


class Schedule(Section):
    """How a number changes: start at the first step, end after so many steps."""

    start: float
    """Value at the first step."""
    end: float
    """Value after `steps` updates, and from then on."""
    steps: Positive
    """Updates from start to end."""
    shape: Literal["linear", "cosine", "step"] = "linear"
    """Straight, or along half a cosine, or all at once after `steps` updates."""


class Metrics(Section):
    """How often, and on how much, student and teacher are compared beyond what the loss needs."""

    every: Positive = 1
    """Steps between measurements; the first and the last step are always measured."""
    token_fraction: Probability = 0.05
    """Fraction of the supervised tokens that are looked at."""
    position_bucket: Natural = 0
    """Tokens of a bucket in metrics by position in the response; 0: no such metrics."""


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
    offload: bool = False
    """Keep its states in host memory but for the update, gradients but in train; needs a GPU."""


class Train(Section):
    """How much is trained, and in what pieces."""

    prompts_per_step: Positive = 64
    """Prompts of one optimizer update, over all replicas."""
    epochs: Positive = 1
    """Passes over the prompts, in full steps; with data.schedule fixed or one_total, steps."""
    steps: Positive | None = None
    """Number of updates, whatever the epochs; null: as many as the epochs give."""
    updates_per_rollout: Positive = 1
    """Updates that one round of rollouts serves, each with the responses to prompts of its own."""
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
    """Responses per prompt; the accuracy is their mean, and more than one give pass@n and maj@n."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0: the most likely token."""
    top_p: Probability = 1.0
    """Sample from the smallest set of tokens with this total probability; 1: from all."""
    max_tokens: Positive | None = None
    """Longest response, in tokens; null: rollout.max_tokens."""
    reward: str = "exact_match"
    """What scores a response: exact_match, math (boxed), math_line (Answer:), module:function."""


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
    teachers: dict[str, Teacher] = {}
    """Several teachers by name, with the keys of teacher; data.teacher_key names a prompt's."""
    base: Base | None = None
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout = Rollout()
    objective: Objective = Objective()
    terms: dict[str, Objective] = {}
    """More losses by name, each with the keys of objective; their weighted sum is minimised."""
    reward: Reward = Reward()
    schedules: dict[str, Schedule] = {}
    """Numbers that change, by key: {objective.veto: {start: 0.8, end: 0.0, steps: 100}}."""
    metrics: Metrics = Metrics()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    eval: Eval = Eval()
    run: Run = Run()
    megatron: dict[str, Any] = {}
    """Fields of Megatron-Core's TransformerConfig, passed on to the student's network."""
    ddp: dict[str, Any] = {}
    """Fields of its DistributedDataParallelConfig: {overlap_grad_reduce: true, bucket_size: N}."""
    vllm: dict[str, Any] = {}
    """Fields of vLLM's EngineArgs, passed on to the engine of rollout.engine=vllm."""

    @property
    def judging(self) -> dict[str, Teacher]:
        """Return the teachers by the name that prompts give them; the only one has none."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    def folder(self, section: Frozen) -> str:
        """Return the directory of a judge's network: the student's, where it has its weights."""
        return self.student.path if section.path is None else section.path

    def longest_prompt(self, section: Frozen) -> int:
        """Return the tokens of the longest prompt that a judge reads."""
        if isinstance(section, Teacher) and section.reads_own_prompt:
            return section.max_prompt_tokens or self.data.max_prompt_tokens
        return self.data.max_prompt_tokens

    @property
    def longest_judged(self) -> int:
        """Tokens of the longest prompt that student or judge reads in training, and response."""
        prompts = [self.longest_prompt(teacher) for teacher in self.judging.values()]
        return max(self.data.max_prompt_tokens, *prompts, 0) + self.rollout.max_tokens

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response, in training or evaluation."""
        answer = max(self.rollout.max_tokens, self.eval.max_tokens or 0)
        return self.data.max_prompt_tokens + answer

    @model_validator(mode="after")
    def _agree(self) -> Self:
        # the rules are about all sections, which they import from here
        from megatron_opd.config_rules import contradictions

        for wrong, line in contradictions(self):
            if wrong:
                raise ValueError(line)
        return self


def key_of_teacher(name: str) -> str:
    """Return the key of the teacher's section; the only teacher has no name."""
    return f"teachers.{name}" if name else "teacher"


def losses(c: Config) -> dict[str, Objective]:
    """Return the sections whose sum is minimised, by their keys."""
    return {"objective": c.objective, **{f"terms.{name}": term for name, term in c.terms.items()}}


def to_yaml(config: Config) -> str:
    """Write out every key, so that the text loads to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def sections() -> dict[str, type[Section]]:
    """Return the sections of a config by name, in order; the first, "", is the top level."""
    found: dict[str, type[Section]] = {"": Config}
    for name, field in Config.model_fields.items():
        if get_origin(field.annotation) is dict:  # many of a kind, by names of the user's
            continue
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
            if not section and key in sections():
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
    known = f"one of {', '.join(table)}, or module:attr" if table else "module:attr"
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}: got '{name}' ({error}), expected {known}") from None
