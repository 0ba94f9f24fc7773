"""One way to lay a model out over ranks, and how far its groups reach."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the mesh `arange(world).view(pp, dp, cp, tp)`; of experts `view(…, ep, etp)`."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def replica(self) -> int:
        """Ranks with the same responses."""
        return self.tp * self.cp * self.pp

    @property
    def world(self) -> int:
        return self.replica * self.dp

    def ranks(self, axis: str) -> int:
        """Return the size of a group: of an axis, dp_cp (gradients), expert_dp, or engine."""
        stage = self.dp * self.cp * self.tp
        joined = {
            "dp_cp": self.dp * self.cp,
            "expert_dp": stage // (self.ep * self.etp),
            "tp_ep": self.ep * self.etp,
            "stage": stage,
            "embedding": min(self.pp, 2),
            "model": self.tp * self.pp,
            "world": self.world,
        }
        return joined[axis] if axis in joined else getattr(self, axis)

    def span(self, axis: str) -> int:
        """Return how many neighbouring ranks hold a whole group of an axis."""
        spans = {
            "tp": self.tp,
            "cp": self.cp * self.tp,
            "dp_cp": self.dp * self.cp * self.tp,
            "stage": self.dp * self.cp * self.tp,
            "etp": self.etp,
            "ep": self.ep * self.etp,
            "tp_ep": self.ep * self.etp,
            "expert_dp": self.dp * self.cp * self.tp,
        }
        return spans.get(axis, self.world)

    def __str__(self) -> str:
        """Name what is not 1, as in "tp 4 sp · pp 2 · dp 8"."""
        words = []
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"):
            size = getattr(self, name)
            if size > 1 and not (name == "etp" and self.ep == 1):
                words.append(f"{name} {size}" + " sp" * (name == "tp" and self.sequence_parallel))
        return " · ".join(words) or "one rank"


def parse(words: str) -> dict[str, int]:
    """Return the sizes in "tp=4,pp=2".

    Raises:
        ValueError: not an axis, or not a positive number.
    """
    known = [field.name for field in fields(Layout) if field.type is int]
    sizes = {}
    for word in words.split(","):
        name, _, text = word.partition("=")
        if name not in known:
            raise ValueError(f"--why: no axis '{name}', expected some of {', '.join(known)}")
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"--why {name}: got '{text}', expected a positive number")
        sizes[name] = int(text)
    return sizes
