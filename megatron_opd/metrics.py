"""What a step measured: summed on every rank, reduced once, written where people look.

Names are `group/name_unit`. A mean is a total and a count that meet only after the reduction, so a
token weighs the same on whatever rank and in whatever microbatch it was.
"""

import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("megatron_opd")
Number = float | Tensor  # a tensor stays on its device until `reduce`: adding never waits for it


class Metrics:
    """Means, maxima and plain values of one step, of one rank."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.values: dict[str, float] = {}

    def mean(self, name: str, total: Number, count: Number) -> None:
        """Add `total` over `count` things to a mean."""
        self.totals[name] = _exact(self.totals.get(name, 0.0)) + _exact(total)
        self.counts[name] = _exact(self.counts.get(name, 0.0)) + _exact(count)

    def max(self, name: str, value: Number) -> None:
        """Let `value` compete for a maximum."""
        value = _exact(value)
        self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def set(self, name: str, value: float) -> None:
        """Record a value that is the same on every rank."""
        self.values[name] = value

    def add(self, means: Mapping[str, tuple[Number, Number]], maxima: Mapping[str, Number]) -> None:
        """Add what the loss of one microbatch returned: (total, count) of means, and maxima."""
        for name, (total, count) in means.items():
            self.mean(name, total, count)
        for name, value in maxima.items():
            self.max(name, value)

    def reduce(self, group: Any, device: torch.device) -> dict[str, float]:
        """Return every mean, maximum and value over the ranks of `group`; collective.

        A rank may lack names that another has (only the last pipeline stage sees a loss): names are
        exchanged first, then one all-reduce of all sums in float64 and one of the maxima. What is
        measured by several ranks alike, as by tensor-parallel peers, leaves a mean as it is. A mean
        over nothing is left out.
        """
        seen: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(seen, (list(self.totals), list(self.maxima)), group=group)
        means = sorted({name for names, _ in seen for name in names})
        maxima = sorted({name for _, names in seen for name in names})
        nothing, lowest = torch.tensor(0.0), torch.tensor(float("-inf"))
        sums = [self.totals.get(name, nothing) for name in means]
        sums += [self.counts.get(name, nothing) for name in means]
        peaks = [self.maxima.get(name, lowest) for name in maxima]
        summed = _all_reduce(sums, dist.ReduceOp.SUM, group, device)
        totals, counts = summed[: len(means)], summed[len(means) :]
        merged = {n: t / c for n, t, c in zip(means, totals, counts, strict=True) if c}
        merged |= zip(maxima, _all_reduce(peaks, dist.ReduceOp.MAX, group, device), strict=True)
        return merged | self.values


def _exact(number: Number) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64)


def _all_reduce(numbers: list[Tensor], op: Any, group: Any, device: torch.device) -> list[float]:
    if not numbers:
        return []
    stacked = torch.stack([_exact(number).to(device) for number in numbers])
    dist.all_reduce(stacked, op=op, group=group)
    return stacked.tolist()


def check_mirrors(*, tensorboard: bool, wandb: str | None) -> None:
    """Raise `ValueError` when a mirror that is asked for cannot work here."""
    for asked, key, package in (
        (tensorboard, "run.tensorboard", "tensorboard"),
        (wandb is not None, "run.wandb", "wandb"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise ValueError(f"{key}: the package is missing; pip install {package}")
    if wandb is not None and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb as client

        if not client.login(prompt=False):
            raise ValueError("run.wandb: no login; run `wandb login`, or set WANDB_MODE=offline")


class RunLog:
    """metrics.jsonl, log.txt and the mirrors of one run; rank 0 alone has one.

    On resuming after step `resume_step`, records after it are forgotten: the file becomes that of a
    run that was never interrupted.
    """

    def __init__(
        self,
        folder: str | Path,
        config: dict[str, Any],
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        resume_step: int = 0,
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mirrors: list[_TensorBoard | _Wandb] = []
        if tensorboard:
            self._mirrors.append(_TensorBoard(self.folder, resume_step))
        if wandb is not None:
            self._mirrors.append(_Wandb(self.folder, wandb, config))
        _forget_after(self.folder / "metrics.jsonl", resume_step)
        self._records = (self.folder / "metrics.jsonl").open("a")
        self._text = logging.FileHandler(self.folder / "log.txt")
        self._text.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self._text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the record of one step, at once and everywhere."""
        self._records.write(json.dumps({"step": step, **metrics}) + "\n")
        self._records.flush()
        for mirror in self._mirrors:
            mirror.log(step, metrics)

    def close(self) -> None:
        """Finish the files and the mirrors."""
        self._records.close()
        log.removeHandler(self._text)
        self._text.close()
        for mirror in self._mirrors:
            mirror.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that a crash cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text("".join(kept))
    rewritten.replace(path)


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A resumed run goes on in the same W&B run; its x axis is our step, not W&B's counter."""

    def __init__(self, folder: Path, project: str, config: dict[str, Any]):
        import wandb

        identity = folder / "wandb_id.txt"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self.run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=config,
            id=identity.read_text(),
            resume="allow",
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def close(self) -> None:
        self.run.finish()


def console_line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Return one line about one step, with the fields that were measured."""
    m = metrics
    fields = [f"step {step}/{steps}"]

    def show(pattern: str, *names: str) -> None:
        if all(name in m for name in names):
            fields.append(pattern.format(*(m[name] for name in names)))

    show("loss {:.4g}", "loss/objective")
    show("rkl {:.4g}", "distill/reverse_kl")
    show("nll {:.4g}", "student/nll")
    show("reward {:.3f}", "reward/mean")
    show("overlap {:.2f}", "distill/overlap_ratio")
    show("ent {:.2f}/{:.2f}", "student/entropy", "teacher/entropy")
    show("mis {:.0e}", "policy/mismatch_kl")
    show("len {:.0f} ({:.0%} cut)", "rollout/response_tokens", "rollout/truncated_fraction")
    show("gnorm {:.2g}", "optim/grad_norm")
    show("acc {:.3f}", "eval/accuracy")
    for name in m:
        if name.startswith(("eval/pass@", "eval/maj@")):
            show(name.removeprefix("eval/") + " {:.3f}", name)
    if "perf/tokens_per_s" in m:
        fields.append(f"{_thousands(m['perf/tokens_per_s'])} tok/s")
    if "time/step_s" in m:
        fields += [_phases(m), f"eta {_duration(m['time/step_s'] * (steps - step))}"]
    return " │ ".join(fields)


def _phases(m: Mapping[str, float]) -> str:
    names = {"roll": "rollout", "teach": "score", "train": "train", "sync": "sync"}
    digits = 1 if m["time/step_s"] >= 10 else 2
    parts = [
        f"{ours} {m[f'time/{name}_s']:.{digits}f}"
        for ours, name in names.items()
        if f"time/{name}_s" in m
    ]
    return f"{m['time/step_s']:.{digits}f}s" + (f" = {' + '.join(parts)}" if parts else "")


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
