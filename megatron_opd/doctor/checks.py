"""The checks: each lets a rule judge one thing that student, teacher and prompts say."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import psutil
import torch

from megatron_opd import build, inputs, memory, signs
from megatron_opd.answers import boxed, stated
from megatron_opd.bench import Who
from megatron_opd.doctor import evidence, prospects, reference, soundness
from megatron_opd.doctor.material import Material
from megatron_opd.doctor.report import NOT_RUN, Row, not_run
from megatron_opd.doctor.verdict import verdict
from megatron_opd.loss import Objective
from megatron_opd.vocabulary import differing_ids

REFERENCE_TEXTS = 4  # that `transformers` reads too: hundreds of tokens are enough
BUCKET = 1024  # tokens, as in the paper, where metrics.position_bucket names none
FIRST = ("tokenizers", "student loads", "teacher loads")  # the others rest on them
GRADED = {"math": (r"\boxed{…}", boxed), "math_line": ("Answer: …", stated)}


def examine(material: Material) -> list[Row]:
    """Return a row a check, and the verdict; every rank calls this and gets the same.

    Raises:
        ValueError: the config cannot run, whatever the models are.
    """
    with closing(material):
        rows = list(_answers(material))
    return [*rows, verdict(rows)]


def _answers(material: Material) -> Iterator[Row]:
    """Make the checks in their order; where one that the others rest on fails, say so instead."""
    blocked = ""
    for name, check in CHECKS.items():
        row = not_run(name, blocked) if blocked else check(material)
        assert row.check == name
        yield row
        if name in FIRST and (row.verdict == "fail" or row.value == NOT_RUN):
            blocked = blocked or f"{name} {'failed' if row.verdict == 'fail' else 'was not run'}"


# Checks that need no model


def tokenizers(m: Material) -> Row:
    """Compare the tokenizers id by id."""
    mine, theirs = m.tokenizers
    ids = len({*mine.get_vocab().values(), *theirs.get_vocab().values()})
    allowed = m.teacher.allow_tokenizer_mismatch
    return soundness.tokenizers(differing_ids(mine, theirs), ids=ids, allowed=allowed)


def cautions(m: Material) -> Row:
    """Repeat what a run would warn of."""
    lines = m.plan.warnings
    if not lines:
        return Row("config", "ok", "nothing to warn of")
    return Row("config", "warn", f"{len(lines)} to look at", "; ".join(lines))


def stop_ids(m: Material) -> Row:
    """Compare what ends a response of the run with what ends one of the teacher's."""
    tokenizer = m.plan.tokenizer
    theirs = inputs.stop_ids(m.teacher_path, m.tokenizers[1])
    names = [
        {index: tokenizer.convert_ids_to_tokens(index) for index in ids}
        for ids in (m.plan.stop_ids, theirs)
    ]
    return soundness.stop_ids(*names)


def memory_of_run(m: Material) -> Row:
    """Compare the estimate with what this device has."""
    judges = build.judges(m.config, m.objective)
    device = m.parallel.device
    phases = memory.estimate(m.config, m.objective, judges, m.plan.dp, device=device.type)
    needed = memory.peak(phases)
    if device.type == "cuda":
        return soundness.memory(needed, torch.cuda.mem_get_info(device)[1], device="the GPU")
    total = psutil.virtual_memory().total // m.parallel.world
    return soundness.memory(needed, total, device="this host, a rank")


# Checks of each model


def loads(m: Material, who: Who) -> Row:
    """Look for weights that are missing, random, or none at all.

    Where the dataset surprises a model as configured, it is asked in other templates too: a
    wrong one is another check's to find.
    """
    if who == "teacher" and who in m.bench.problems and m.teacher.kind == "server":
        return not_run("teacher loads", f"it is behind a server: {m.bench.problems[who]}")
    if who in m.bench.problems:
        advice = f"{m.bench.problems[who]}; look at {who}.path"
        return Row(f"{who} loads", "fail", "its weights cannot be used", advice)
    texts, size = dict(m.texts), m.plan.vocab_size
    sound = all(evidence.is_finite(name, texts) for name in ("student", "teacher"))
    if sound and not m.bench.problems:
        texts["the other's responses"] = m.by_teacher if who == "student" else m.student
    if not texts:
        return not_run(f"{who} loads", "no prompt has two tokens or an answer, so there is no text")
    row = soundness.loads(who, evidence.sanity(who, texts, size))
    if row.verdict == "fail" and sound and not m.teacher.reads_own_prompt:
        for keys, prompts in m.ways[0].items():
            rollouts = m.answered(prompts)
            texts |= {keys: m.looked(rollouts)} if rollouts else {}
        row = soundness.loads(who, evidence.sanity(who, texts, size))
    return row


def logits(m: Material, who: Who) -> Row:
    """Compare with `transformers` in fp32, on the host of rank 0."""
    section = m.config.student if who == "student" else m.teacher
    path = m.config.student.path if who == "student" else m.teacher_path
    if path == m.config.student.path and m.config.student.init == "random":
        return not_run(f"{who} logits", "student.init=random: its weights are in no file")
    told = next(iter(m.texts.values()), None)
    reason = m.parallel.owner(lambda: reference.too_large(path))
    if told is None or reason:
        return not_run(f"{who} logits", reason or "there is no text to read")
    if m.teacher.reads_own_prompt and "prompts" not in m.texts:
        return not_run(f"{who} logits", "the teacher reads another prompt")
    some, size = told.rollouts[:REFERENCE_TEXTS], m.plan.vocab_size
    nll_T = m.parallel.owner(lambda: reference.response_nll(path, some, size))
    ours_T = told.metric_T[f"{who}/nll"][: len(nll_T)]
    dtype = section.dtype or m.config.student.dtype
    largest = float(abs(ours_T - nll_T).max())
    return soundness.same_logits(who, largest, dtype=dtype, tokens=len(nll_T))


# Checks of the pair


def engine(m: Material) -> Row:
    """Compare the engine's log-probabilities with the trainer's."""
    rollout = m.config.rollout
    if rollout.engine == "replay":
        return not_run("engine = trainer", "rollout.engine=replay draws nothing")
    if rollout.top_p < 1 or rollout.top_k:
        reason = "rollout.top_p and top_k cut the engine's distribution, and not the trainer's"
        return not_run("engine = trainer", reason)
    kl_T, largest_T = (m.student.metric_T[f"policy/mismatch_{x}"] for x in ("kl", "max"))
    return soundness.engine(rollout.engine, float(kl_T.mean()), float(largest_T.max()))


def control(m: Material) -> Row:
    """Put the student in the teacher's place."""
    reason = _moves_anyway(m.lead)
    if reason:
        return not_run("teacher = student", reason)
    own = m.bench.mine(m.student.rollouts)
    return soundness.control(m.bench.control(m.lead, own))


def overlap(m: Material) -> Row:
    """Look at how many of the most likely tokens both models share."""
    ratio = evidence.per_token(m.student, "distill/overlap_ratio")
    how = {"k": m.bench.k, "vocab_size": m.plan.vocab_size, "remedy": m.remedy}
    return prospects.overlap(ratio, **how)


def mass(m: Material) -> Row:
    """Look at how probable the shared ones are."""
    names = ("distill/overlap_mass_student", "distill/overlap_mass_teacher")
    masses = (evidence.per_token(m.student, name) for name in names)
    return prospects.mass(*masses, remedy=m.remedy)


def entropy_gap(m: Material) -> Row:
    """Compare how sure both are."""
    sure = (m.student.metric_T[f"{who}/entropy"].mean() for who in ("student", "teacher"))
    return prospects.entropy_gap(evidence.per_token(m.student, "distill/entropy_gap"), *sure)


def reverse_kl(m: Material) -> Row:
    """Look at what the loss starts from."""
    return prospects.reverse_kl(evidence.per_token(m.student, "distill/reverse_kl"))


def template(m: Material) -> Row:
    """Let the student answer the same questions in other templates."""
    if m.teacher.reads_own_prompt:
        return not_run("template", "the teacher reads a prompt of its own")
    ways, failed = m.ways
    name = evidence.overlap_name(m.bench.k, m.plan.vocab_size)
    found = [
        evidence.variant(keys, m.written("student", prompts), m.student, name)
        for keys, prompts in ways.items()
    ]
    kl, overlap = (
        float(evidence.per_response(m.student, metric).mean())
        for metric in ("distill/reverse_kl", name)
    )
    ratio = name == "distill/overlap_ratio"
    failing = signs.OVERLAP_FAILING if ratio else signs.MASS_FAILING
    return prospects.template(kl, overlap, found, failed, failing=failing)


def reward_auroc(m: Material) -> Row:
    """Ask whether the teacher's reward of whole responses follows the verifier."""
    if m.ungraded:
        return not_run("reward AUROC", m.ungraded)
    right_R = m.student.right_R
    found = evidence.reward_auroc(m.student)
    return prospects.reward_auroc(found, right=int(right_R.sum()), responses=len(right_R))


def margin(m: Material) -> Row:
    """Compare how often student and teacher are right."""
    if m.ungraded:
        return not_run("teacher's margin", m.ungraded)
    return prospects.margin(*m.accuracies)


def truncation(m: Material) -> Row:
    """Count responses that do not end."""
    cut = (float(1 - told.finished_R.mean()) for told in (m.student, m.by_teacher))
    return prospects.truncation(*cut, max_tokens=m.config.rollout.max_tokens)


def form(m: Material) -> Row:
    """Count responses that the run supervises, or else that the grader can read."""
    pattern, graded = m.config.rollout.mask_format, GRADED.get(m.config.eval.reward)
    if pattern is not None:
        what, reads = f"rollout.mask_format {pattern!r}", re.compile(pattern).search
        remedy = "responses without rollout.mask_format are not supervised: few are left"
    elif graded is not None:
        what, reads = graded
        remedy = (
            f"eval.reward={m.config.eval.reward} scores responses without {what} 0: choose "
            "the data.template that asks for it (boxed: math; dapo: math_line)"
        )
    else:
        return Row("format", "ok", f"eval.reward={m.config.eval.reward} asks for none")
    shares = []
    for told in (m.student, m.by_teacher):
        found = [reads(m.text(rollout)) is not None for rollout in told.rollouts]
        shares.append(sum(found) / len(found))
    return prospects.form(what, *shares, remedy=remedy)


def news(m: Material) -> Row:
    """Ask whether the teacher is more than the student itself."""
    kl = evidence.per_token(m.student, "distill/reverse_kl").value
    same = m.bench.same_weights and not m.teacher.reads_own_prompt
    difference = None if m.ungraded else m.accuracies[2]
    return prospects.news(kl, difference, equal_weights=same)


def reach(m: Material) -> Row:
    """Look for positions from which on the teacher has nothing to say."""
    width = m.config.metrics.position_bucket or BUCKET
    return prospects.reach(evidence.buckets(m.student, width))


def _moves_anyway(o: Objective) -> str:
    """Say why the objective need not be 0 where both models agree; empty: it is."""
    if o.divergence in ("cross_entropy", "outcome"):
        return f"objective.divergence={o.divergence} compares with no teacher"
    if o.student_temperature != o.teacher_temperature:
        return "the temperatures of student and teacher differ"
    if o.veto:
        return "objective.veto moves the student on its own"
    if o.needs_reward or o.group_normalize != "none":
        return "the objective wants rewards, which are not given here"
    return ""


CHECKS: dict[str, Callable[[Material], Row]] = {
    "tokenizers": tokenizers,
    "config": cautions,
    "stop ids": stop_ids,
    "memory": memory_of_run,
    "student loads": partial(loads, who="student"),
    "teacher loads": partial(loads, who="teacher"),
    "student logits": partial(logits, who="student"),
    "teacher logits": partial(logits, who="teacher"),
    "engine = trainer": engine,
    "teacher = student": control,
    "overlap ratio": overlap,
    "overlap mass": mass,
    "entropy gap": entropy_gap,
    "reverse KL": reverse_kl,
    "template": template,
    "reward AUROC": reward_auroc,
    "teacher's margin": margin,
    "truncation": truncation,
    "format": form,
    "new knowledge": news,
    "signal by position": reach,
}
