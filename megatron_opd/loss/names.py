"""The names that settings of the loss may have, and how rules tell of them."""

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from megatron_opd.loss import divergences, supports
from megatron_opd.loss.weights import WEIGHTS

if TYPE_CHECKING:
    from megatron_opd.loss.objective import Objective

SUPPORTS = (*supports.SUPPORTS, "full")
WITHOUT_TEACHER = ("cross_entropy", "outcome")
DIVERGENCES = (*divergences.OVER_A_SET, *WITHOUT_TEACHER)
Rules = Iterator[tuple[bool, str]]  # is it so, what to tell the user


def unknown(o: "Objective") -> Rules:
    """Yield the names that nothing has."""
    for key, kind in get_type_hints(type(o)).items():
        known, section = get_args(kind), "rollout" if key == "correction" else "objective"
        if get_origin(kind) is Literal and getattr(o, key) not in known:
            yield True, f"{section}.{key}: got '{getattr(o, key)}', expected {', '.join(known)}"
    named = [("support", o.support, SUPPORTS), ("divergence", o.divergence, DIVERGENCES)]
    named += [("weights", name, tuple(WEIGHTS)) for name in o.weights]
    for key, name, known in named:
        if isinstance(name, str) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            yield (
                True,
                f"objective.{key}: got '{name}', expected {', '.join(known)}, or a function as "
                f"module:name{hint}",
            )


def shown(name: str | Callable) -> str:
    """Return a setting as the user calls it."""
    return f"'{name}'" if isinstance(name, str) else getattr(name, "__name__", repr(name))
