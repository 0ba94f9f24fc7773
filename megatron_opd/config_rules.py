"""What sections of a config exclude each other, and which options then change nothing.

What excludes what within the objective, `loss.Objective` says.
"""

import re
from collections.abc import Iterable

from megatron_opd.config import (
    Config,
    Mesh,
    Objective,
    Teacher,
    key_of_teacher,
    losses,
    sections,
)

Rules = Iterable[tuple[bool, str]]  # is it so, and what to tell the user
Idle = Iterable[tuple[bool, tuple[str, ...]]]  # is it so, and the options without effect


def contradictions(c: Config) -> Rules:
    """Yield what cannot be together."""
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
    yield from _about_meshes(c)
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


def _about_data(c: Config) -> Rules:
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


def _about_meshes(c: Config) -> Rules:
    for key, mesh in {"parallel": c.parallel, **_own_meshes(c)}.items():
        yield (
            mesh.vpp > 1 and mesh.pp == 1,
            f"{key}.vpp: got {mesh.vpp}, expected 1 with {key}.pp=1: virtual stages are shares of "
            "a pipeline's stage",
        )


def _own_meshes(c: Config) -> dict[str, Mesh]:
    """Return the meshes that judges have of their own, by their keys."""
    judges = {key_of_teacher(name): teacher.parallel for name, teacher in c.judging.items()}
    judges |= {"base": c.base.parallel} if c.base else {}
    return {f"{key}.parallel": mesh for key, mesh in judges.items() if mesh is not None}


def _about_servers(c: Config) -> Rules:
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


def _about_teachers(c: Config) -> Rules:
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


def _about_teacher(c: Config, key: str, teacher: Teacher) -> Rules:
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
    yield (
        copies and teacher.parallel is not None,
        f"{key}.parallel: set, but with weights={teacher.weights} the teacher is split as the "
        f"student is; set {key}.parallel=null",
    )
    if served:
        yield from _about_served_teacher(c, key, teacher)


def _about_served_teacher(c: Config, key: str, teacher: Teacher) -> Rules:
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
    yield (
        teacher.parallel is not None,
        f"{key}.parallel: set, but kind=server is split as it was started; set {key}.parallel=null",
    )


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
    found += [
        (key, Mesh.model_fields, mesh, ("sequence_parallel",))
        for key, mesh in _own_meshes(c).items()
        if mesh.tp == 1
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


def _idle_in_objective(o: Objective) -> Idle:
    """Yield (is it so, options that then change nothing) of what `loss.Objective` accepts."""
    alone, sampled = o.divergence in ("cross_entropy", "outcome"), o.support == "sampled"
    yield alone and not o.weights, ("k", "teacher_temperature")
    yield o.divergence != "jsd", ("jsd_beta", "jsd_rescale")
    yield o.divergence != "skew_kl", ("skew_alpha",)
    yield not sampled or o.divergence != "reverse_kl", ("estimator",)
    yield sampled or o.support == "full", ("normalize",)
    yield sampled or o.form == "direct", ("reward_weight", "reward_weight_normalize")
    yield o.student_temperature * o.teacher_temperature == 1, ("temperature_squared",)


def _idle_in_teacher(c: Config, t: Teacher) -> Idle:
    """Yield (is it so, options that then change nothing) of a teacher's section."""
    yield t.kind != "server", ("url", "timeout_s", "retries")
    yield t.kind == "server", ("dtype",)
    yield t.weights != "ema", ("ema_rate",)
    yield t.weights != "file", ("allow_tokenizer_mismatch",)
    yield not t.reads_own_prompt, ("max_prompt_tokens",)
    yield c.data.chat_template == "none", ("chat_template_kwargs",)
