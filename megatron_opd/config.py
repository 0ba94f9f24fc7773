"""Every knob, typed and frozen, with its help sentence; the checks across sections.

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


class Teacher(Frozen):
    """The model that judges; not needed when the divergence is cross_entropy."""

    weights: Literal["file", "student", "ema", "live"] = "file"
    """Whose: path's (file), the student's at the start, their running mean, or those of now."""
    ema_rate: Probability = 0.05
    """Share of the student's weights that enters the running mean of weights=ema every step."""
    template: str | None = None
    """What it reads for the user's message: opsd, sdft, or a file with {message}; null: the same."""
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
    """Share of the prompts that the dataset's response answers, once, and no engine (GKD's 1 − λ)."""
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
    """What scores a response: exact_match, math (boxed), math_line (Answer:), or module:function."""


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
        for wrong, line in _contradictions(self):
            if wrong:
                raise ValueError(line)
        return self


def _contradictions(c: Config) -> Iterable[tuple[bool, str]]:
    """Yield (is it so, what to tell the user) for sections that exclude each other.

    What excludes what within the objective, `loss.Objective` says.
    """
    replay = c.rollout.engine == "replay"
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
    yield (
        replay and c.rollout.data_fraction > 0,
        f"rollout.data_fraction: got {c.rollout.data_fraction:g}, expected 0 with rollout.engine="
        "replay, which takes every response from the dataset",
    )
    yield from _about_data(c)
    yield from _about_servers(c)
    yield from _about_teachers(c)
    yield (
        c.parallel.tp % c.rollout.tp != 0,
        f"rollout.tp: got {c.rollout.tp}, expected a divisor of parallel.tp={c.parallel.tp}",
    )
    longest, read = c.longest_judged, "data.max_prompt_tokens"
    if longest > c.data.max_prompt_tokens + c.rollout.max_tokens:
        read = "the longest teacher.max_prompt_tokens"
    yield (
        c.train.microbatch_tokens < longest,
        f"train.microbatch_tokens: got {c.train.microbatch_tokens}, expected at least {longest} = "
        f"{read} + rollout.max_tokens, so that the longest sequence fits",
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


def _about_data(c: Config) -> Iterable[tuple[bool, str]]:
    data, schedule = c.data, c.data.schedule
    if data.weights is not None:
        yield (
            len(data.weights) != len(data.prompts),
            f"data.weights: got {len(data.weights)}, expected {len(data.prompts)}: one for each "
            "file of data.prompts",
        )
        yield (
            schedule == "one_total",
            "data.weights: set, but data.schedule=one_total shows one prompt for ever; set "
            "data.weights=null",
        )
    yield (
        schedule in ("one_per_batch", "one_total") and c.rollout.engine == "replay",
        f"data.schedule: got '{schedule}', whose copies of a prompt differ in their samples, but "
        "rollout.engine=replay has one response for all; set all or fixed",
    )


def _about_servers(c: Config) -> Iterable[tuple[bool, str]]:
    served = c.rollout.engine == "vllm_server"
    yield (
        served and not c.rollout.url,
        "rollout.url: missing, but rollout.engine=vllm_server asks a server; set its address",
    )
    yield (
        bool(c.rollout.async_depth) and not served,
        f"rollout.async_depth: got {c.rollout.async_depth}, expected 0 with rollout.engine="
        f"{c.rollout.engine}: only a server (vllm_server) writes while the student trains",
    )
    for key, idle in (
        ("rollout.data_fraction", c.rollout.data_fraction == 0),
        ("train.updates_per_rollout", c.train.updates_per_rollout == 1),
    ):
        yield (
            bool(c.rollout.async_depth) and not idle,
            f"{key}: expected its default with rollout.async_depth=1, which writes the responses "
            "of exactly one step ahead; set rollout.async_depth=0",
        )


def _about_teachers(c: Config) -> Iterable[tuple[bool, str]]:
    yield c.base is not None and c.base.path is None, "base.path: missing; name a directory"
    yield (
        c.teacher is not None and bool(c.teachers),
        "teachers: set, and teacher too, which would judge every prompt; set teacher=null",
    )
    for name, teacher in c.judging.items():
        yield (
            bool(name) and not re.fullmatch(r"[A-Za-z][\w-]*", name),
            f"teachers: got the name '{name}', expected letters, digits, - and _ after a letter: "
            "it is part of the names of metrics",
        )
        yield from _about_teacher(c, key_of_teacher(name), teacher)


def _about_teacher(c: Config, key: str, teacher: Teacher) -> Iterable[tuple[bool, str]]:
    copies, served = teacher.weights != "file", teacher.kind == "server"
    yield (
        not copies and teacher.path is None,
        f"{key}.path: missing; name a directory, or set {key}.weights to student, ema or live",
    )
    yield (
        served and copies,
        f"{key}.weights: got '{teacher.weights}', expected file with kind=server: a server keeps "
        "the weights that it was started with",
    )
    yield (
        copies and teacher.path is not None,
        f"{key}.path: got '{teacher.path}', expected none with weights={teacher.weights}: network "
        f"and weights are the student's; set {key}.path=null",
    )
    live = teacher.weights == "live"
    yield (
        live and teacher.dtype is not None,
        f"{key}.dtype: got '{teacher.dtype}', expected null with weights=live: the student judges",
    )
    yield (
        live and teacher.offload,
        f"{key}.offload: got true, expected false with weights=live: the student stays",
    )
    if served:
        yield from _about_served_teacher(c, key, teacher)


def _about_served_teacher(c: Config, key: str, teacher: Teacher) -> Iterable[tuple[bool, str]]:
    yield not teacher.url, f"{key}.url: missing, but {key}.kind=server asks one; set it"
    yield (
        teacher.payload == "hidden",
        f"{key}.payload: got 'hidden', expected topk or sampled with {key}.kind=server: a "
        "server sends log-probabilities and no hidden states, which other supports want",
    )
    for where, loss in losses(c).items():
        yield (
            loss.teacher_temperature != 1,
            f"{where}.teacher_temperature: got {loss.teacher_temperature:g}, expected 1 with "
            f"{key}.kind=server: a server scores a prompt at temperature 1",
        )
    yield teacher.offload, f"{key}.offload: got true, but the server keeps its own memory"


def key_of_teacher(name: str) -> str:
    """Return the key of the teacher's section; the only teacher has no name."""
    return f"teachers.{name}" if name else "teacher"


def cautions(c: Config) -> list[str]:
    """Name options that have no effect with the others, and pairs that are seldom meant."""
    replay, graded = c.rollout.engine == "replay", bool(c.eval.prompts)
    defaults = {name: kind.model_fields for name, kind in sections().items()}
    idle = [
        (c.data.chat_template == "none", "data", ("chat_template_kwargs",)),
        (len(c.data.prompts) == 1, "data", ("weights",)),
        (replay, "rollout", ("temperature", "top_p", "top_k", "logprobs")),
        (replay and not graded, "rollout", ("stop_token_ids", "batch_size")),
        (c.rollout.correction in ("none", "tis"), "rollout", ("correction_low",)),
        (c.rollout.correction == "none", "rollout", ("correction_high",)),
        (not c.rollout.data_fraction, "rollout", ("data_choice",)),
        (c.rollout.engine != "vllm", "rollout", ("tp",)),
        (c.rollout.engine != "vllm_server", "rollout", ("url", "timeout_s", "retries")),
        (c.rollout.engine != "vllm", "", ("vllm",)),
        (c.optimizer.schedule == "constant", "optimizer", ("min_lr",)),
        (c.parallel.tp == 1, "parallel", ("sequence_parallel",)),
        (not c.run.save_every, "run", ("keep",)),
        (not graded, "eval", ("n", "temperature", "top_p", "max_tokens", "reward")),
        (c.eval.temperature == 0, "eval", ("top_p",)),
        (c.train.steps is not None, "train", ("epochs",)),
        (not c.reward.function and not replay, "reward", ("normalize",)),
    ]
    found = [
        (where, defaults[where], getattr(c, where) if where else c, names)
        for without_effect, where, names in idle
        if without_effect
    ]
    found += [
        (where, Objective.model_fields, loss, names)
        for where, loss in losses(c).items()
        for without_effect, names in _idle_in_objective(loss)
        if without_effect
    ]
    found += [
        (key_of_teacher(name), Teacher.model_fields, teacher, names)
        for name, teacher in c.judging.items()
        for without_effect, names in _idle_in_teacher(c, teacher)
        if without_effect
    ]
    lines = [
        f"{where}.{name}: has no effect in this config".lstrip(".")
        for where, fields, section, names in found
        for name in names
        if getattr(section, name) != fields[name].default
    ]
    if not replay and (c.rollout.top_p < 1 or c.rollout.top_k):
        lines.append(
            f"rollout.top_p={c.rollout.top_p:g}, rollout.top_k={c.rollout.top_k}: responses come "
            "from a truncated distribution, the loss is over the whole one"
        )
    lines += [
        f"{key_of_teacher(name)}.weights=live: the teacher is the student and reads what it reads, "
        "so there is nothing to learn from it; set a template"
        for name, teacher in c.judging.items()
        if teacher.weights == "live" and not teacher.reads_own_prompt
    ]
    for where, loss in losses(c).items():
        drawn, scored = c.rollout.temperature, loss.student_temperature
        estimates = loss.support == "sampled" and loss.divergence in ("reverse_kl", "outcome")
        if estimates and drawn != scored:
            lines.append(
                f"rollout.temperature={drawn:g}, {where}.student_temperature={scored:g}: the "
                "sampled-token estimate is unbiased only when they are equal"
            )
    return lines


def losses(c: Config) -> dict[str, Objective]:
    """Return the sections whose sum is minimised, by their keys."""
    return {"objective": c.objective, **{f"terms.{name}": term for name, term in c.terms.items()}}


def _idle_in_objective(o: Objective) -> Iterable[tuple[bool, tuple[str, ...]]]:
    """Yield (is it so, options that then change nothing) of what `loss.Objective` accepts."""
    alone, sampled = o.divergence in ("cross_entropy", "outcome"), o.support == "sampled"
    yield alone and not o.weights, ("k", "teacher_temperature")
    yield o.divergence != "jsd", ("jsd_beta", "jsd_rescale")
    yield o.divergence != "skew_kl", ("skew_alpha",)
    yield not sampled or o.divergence != "reverse_kl", ("estimator",)
    yield sampled or o.support == "full", ("normalize",)
    yield sampled or o.form == "direct", ("reward_weight", "reward_weight_normalize")
    yield o.student_temperature * o.teacher_temperature == 1, ("temperature_squared",)


def _idle_in_teacher(c: Config, t: Teacher) -> Iterable[tuple[bool, tuple[str, ...]]]:
    """Yield (is it so, options that then change nothing) of a teacher's section."""
    yield t.kind != "server", ("url", "timeout_s", "retries")
    yield t.kind == "server", ("dtype",)
    yield t.weights != "ema", ("ema_rate",)
    yield t.weights != "file", ("allow_tokenizer_mismatch",)
    yield not t.reads_own_prompt, ("max_prompt_tokens",)
    yield c.data.chat_template == "none", ("chat_template_kwargs",)


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
    known = f"one of {', '.join(table)}, or module:attr" if table else "module:attr"
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}: got '{name}' ({error}), expected {known}") from None
