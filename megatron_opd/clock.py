"""Where the time of a step goes."""

import time

import torch


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Charge the time since the previous lap to `phase`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        name = f"time/{phase}_s"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def read(self) -> dict[str, float]:
        """Return the seconds of every phase, and of the whole step."""
        return {**self.seconds, "time/step_s": self.last - self.start}
