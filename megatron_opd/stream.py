"""Which prompts a step gets: one list or a mix of several, and a cursor that can be resumed."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from megatron_opd.types import Prompt


class PromptStream:
    """Prompts, for ever; where it stands can be saved and restored.

    `sources` are the prompts of each file. Without `weights` they are one list; with them, each
    has its share of every step and passes of its own. `schedule` says what a step gets of this:
    "all": what comes next; "fixed": what came first; "one_per_batch": copies of the next prompt;
    "one_total": copies of the first.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Prompt]],
        seed: int,
        *,
        shuffle: bool = False,
        weights: Sequence[float] | None = None,
        schedule: str = "all",
    ):
        self.prompts = [prompt for source in sources for prompt in source]
        self.seed, self.shuffle, self.weights = seed, shuffle, weights
        self.schedule = schedule
        self.epoch = 0  # of the step that was taken last
        self.steps = 0  # taken
        lists = [self.prompts] if weights is None else sources
        self._passes = [_Pass(prompts, seed, i, shuffle) for i, prompts in enumerate(lists)]
        parts = [Fraction(weight) for weight in weights or (1,)]
        self._shares = [part / sum(parts) for part in parts]

    def take(self, n: int) -> list[Prompt]:
        """Return the n prompts of the next step; what is there several times is numbered.

        In one list, what is left of a pass and too few for a step is skipped, so that the prompts
        of a step differ.
        """
        self.epoch = self.steps // steps_per_epoch(self.schedule, len(self.prompts), n)
        self.steps += 1
        if self.schedule in ("fixed", "one_total"):
            for one in self._passes:
                one.restart()
        different = 1 if self.schedule in ("one_per_batch", "one_total") else n
        if self.weights is None:
            self._passes[0].make_room(different)
        drawn = [self._most_urgent().next() for _ in range(different)]
        return numbered(drawn * (n // different))

    def _most_urgent(self) -> "_Pass":
        """Return the list whose turn it is, so that each has its share up to less than one prompt.

        Of those that are at least 1/(2k−2) behind, the first to be a prompt behind is taken: that
        keeps all k counts within 1 − 1/(2k−2) of their shares at any time (Tijdeman, 1980, the
        chairman assignment problem). The largest remainder alone does not: 3 : 1 : 38 : 38 : 1 :
        38 leaves a list 1.12 prompts behind.
        """
        if len(self._passes) == 1:
            return self._passes[0]
        total = 1 + sum(one.taken for one in self._passes)
        slack = Fraction(1, 2 * len(self._passes) - 2)
        behind = [
            share * total - one.taken for share, one in zip(self._shares, self._passes, strict=True)
        ]
        late = [i for i, amount in enumerate(behind) if amount >= slack]
        return self._passes[min(late, key=lambda i: (1 - slack - behind[i]) / self._shares[i])]

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, and what it streams over."""
        cursors = [[one.epoch, one.position] for one in self._passes]
        return {"epoch": self.epoch, "steps": self.steps, "cursors": cursors, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: seed, shuffling, mix, schedule or the prompts are others.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"data: {name} is {value}, but the checkpoint was taken with {state[name]}; "
                    "resume with the same data, or start another run.dir"
                )
        self.epoch, self.steps = state["epoch"], state["steps"]
        for one, (epoch, position) in zip(self._passes, state["cursors"], strict=True):
            one.epoch, one.position = epoch, position

    @cached_property
    def _identity(self) -> dict[str, Any]:
        tokens = repr([prompt.token_ids for prompt in self.prompts]).encode()
        counts = [len(one.prompts) for one in self._passes]
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "weights": None if self.weights is None else list(self.weights),
            "schedule": self.schedule,
            "number of prompts": counts[0] if self.weights is None else counts,
            "hash of their tokens": hashlib.blake2b(tokens, digest_size=8).hexdigest(),
        }


class _Pass:
    """One list of prompts, gone through again and again."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, number: int, shuffle: bool):
        self.prompts, self.seed, self.number, self.shuffle = prompts, seed, number, shuffle
        self._ordered: tuple[int, np.ndarray] | None = None  # an epoch, and its order
        self.restart()

    def restart(self) -> None:
        """Go back to the first prompt of the first pass."""
        self.epoch = 0  # this pass
        self.position = 0  # prompts taken of this pass

    @property
    def taken(self) -> int:
        """Prompts taken in all, where none is skipped."""
        return self.epoch * len(self.prompts) + self.position

    def make_room(self, n: int) -> None:
        """Begin another pass if fewer than n prompts are left of this one."""
        assert n <= len(self.prompts)
        if self.position + n > len(self.prompts):
            self.epoch, self.position = self.epoch + 1, 0

    def next(self) -> Prompt:
        self.make_room(1)
        self.position += 1
        return self.prompts[self._order()[self.position - 1]]

    def _order(self) -> np.ndarray:
        """Return this pass's order: a function of seed and epoch alone, so it need not be saved."""
        if self._ordered is None or self._ordered[0] != self.epoch:
            order = np.arange(len(self.prompts))
            if self.shuffle:
                own = (self.seed, self.epoch, self.number)
                order = np.random.default_rng(own).permutation(order)
            self._ordered = self.epoch, order
        return self._ordered[1]


def numbered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Count the copies of each prompt, so that the samples of one are drawn differently."""
    seen: Counter[int] = Counter()
    counted = []
    for prompt in prompts:
        counted.append(replace(prompt, copy=seen[prompt.index]))
        seen[prompt.index] += 1
    return counted


def steps_per_epoch(schedule: str, prompts: int, n: int) -> int:
    """Return the steps, of n prompts each, in which a schedule shows once what it shows.

    "all": the prompts that fill a step; "one_per_batch": each prompt; "fixed", "one_total": 1.
    """
    return {"all": prompts // n, "one_per_batch": prompts}.get(schedule, 1)
