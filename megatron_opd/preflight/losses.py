"""Does the objective get what it wants: ids, scores, rewards, drawn tokens."""

from collections.abc import Iterator

from megatron_opd import build, schedule
from megatron_opd.config import Config, key_of_teacher
from megatron_opd.loss import Objective, Total
from megatron_opd.loss.fits import asked_by
from megatron_opd.reward import REWARDS


def check_objective(config: Config) -> None:
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


def without_comparison(config: Config) -> Iterator[str]:
    """Yield that every response is alone, where its advantage over others is wanted."""
    objectives = [build.build_objective(end) for end in schedule.ends(config)]
    asks = any(term.outcome_weight for objective in objectives for term in objective.terms)
    if asks and config.rollout.n == 1 and config.rollout.engine != "replay":
        yield (
            "rollout.n=1: a response has no other to be compared with, so that its advantage is "
            "its reward"
        )


def larger_payloads(config: Config) -> Iterator[str]:
    """Yield which teacher sends more between its mesh and the student's than the objective wants.

    It is not changed for the user: what looks at the teacher's whole distribution, as most metrics
    do, would be gone.
    """
    objectives = [build.build_objective(end) for end in schedule.ends(config)]
    for name, teacher in config.judging.items():
        if teacher.parallel is None or teacher.payload != "hidden":
            continue
        for payload, bytes_of in (("sampled", 4), ("topk", 8 * max(o.k for o in objectives))):
            if not any(why for o in objectives for why in o.needs_hidden(topk=payload == "topk")):
                yield (
                    f"{key_of_teacher(name)}.payload=hidden: the objective is served by {payload}, "
                    f"{bytes_of} bytes a token between the meshes instead of a hidden state; "
                    "metrics of the teacher's whole distribution are what hidden states buy"
                )
                break
