"""What models said of tokens → the figures that rules judge.

Shape suffixes: R responses · T tokens of them all.
"""

from collections.abc import Mapping

import numpy as np

from megatron_opd import signs
from megatron_opd.doctor.prospects import Bucket, Variant
from megatron_opd.doctor.soundness import Sanity
from megatron_opd.probes.reward_auroc import mean_reward
from megatron_opd.probes.statistics import Estimate, auroc, mean
from megatron_opd.told import Told


def per_token(told: Told, name: str) -> Estimate:
    """Return the mean of a metric over tokens, its interval over prompts."""
    return _known(mean(told.metric_T[name], told.prompt_R[told.rollout_T]))


def per_response(told: Told, name: str) -> np.ndarray:
    """Return the mean of a metric over the tokens of each response, [R]."""
    return np.array([values.mean() for values in told.split(told.metric_T[name])])


def _known(found: Estimate | None) -> Estimate:
    assert found is not None, "a mean over no token"
    return found


def sanity(who: str, texts: Mapping[str, Told], vocab_size: int) -> Sanity:
    """Return what a model, student or teacher, says of texts that are not its own."""
    nll_T = {name: told.metric_T[f"{who}/nll"] for name, told in texts.items()}
    entropy_T = np.concatenate([told.metric_T[f"{who}/entropy"] for told in texts.values()])
    choice_T = np.concatenate([told.metric_T[f"{who}/first_choice"] for told in texts.values()])
    return Sanity(
        finite=is_finite(who, texts),
        vocab_size=vocab_size,
        entropy=float(entropy_T.mean()),
        nll={name: float(value_T.mean()) for name, value_T in nll_T.items()},
        choices=len(np.unique(choice_T)),
        tokens=len(choice_T),
    )


def is_finite(who: str, texts: Mapping[str, Told]) -> bool:
    """Say whether a model has a log-probability for every token of some texts."""
    names = (f"{who}/nll", f"{who}/entropy")
    return all(np.isfinite(told.metric_T[name]).all() for told in texts.values() for name in names)


def overlap_name(k: int, vocab_size: int) -> str:
    """Return the metric by which the agreement of two models is compared."""
    ratio, mass = "distill/overlap_ratio", "distill/overlap_mass_student"
    return ratio if signs.ratio_counts(k, vocab_size) else mass


def variant(keys: str, told: Told, configured: Told, overlap: str) -> Variant:
    """Compare responses to prompts rendered in another way with those as configured."""
    kl, ours = per_response(told, "distill/reverse_kl"), per_response(told, overlap)
    index_R = [list(configured.prompt_R).index(index) for index in told.prompt_R]
    their_kl = per_response(configured, "distill/reverse_kl")[index_R]
    theirs = per_response(configured, overlap)[index_R]
    return Variant(
        keys=keys,
        kl=float(kl.mean()),
        overlap=float(ours.mean()),
        kl_less=_known(mean(their_kl - kl, told.prompt_R)),
        overlap_more=_known(mean(ours - theirs, told.prompt_R)),
    )


def reward_auroc(told: Told) -> Estimate | None:
    """Return how well the mean of log q − log p over a response tells right from wrong."""
    return auroc(mean_reward(told), told.right_R, told.prompt_R).overall


def accuracies(student: Told, teacher: Told) -> tuple[Estimate, Estimate, Estimate]:
    """Return the student's accuracy, the teacher's, and the difference on the same prompts."""
    ours, theirs = student.right_R.astype(float), teacher.right_R.astype(float)
    prompt_R = student.prompt_R
    assert (prompt_R == teacher.prompt_R).all()
    return (
        _known(mean(ours, prompt_R)),
        _known(mean(theirs, prompt_R)),
        _known(mean(theirs - ours, prompt_R)),
    )


def buckets(told: Told, width: int) -> list[Bucket]:
    """Return the reverse KL by position in the response."""
    bucket_T, prompt_T = told.position_T // width, told.prompt_R[told.rollout_T]
    kl_T = told.metric_T["distill/reverse_kl"]
    return [
        Bucket(
            start=int(index) * width,
            kl=_known(mean(kl_T[bucket_T == index], prompt_T[bucket_T == index])),
            responses=len(np.unique(told.rollout_T[bucket_T == index])),
        )
        for index in np.unique(bucket_T)
    ]
