"""Save, restore and prune the state of a run: weights, their running means, optimiser, cursor.

A checkpoint is written under a temporary name and renamed when complete, so every directory called
`step_…` is whole. Randomness is counter-based (seed, step, request), so no generator is saved.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_opd.model.config import HFConfig
from megatron_opd.model.torch_dist import (
    fork_checkpoint_writer,
    sharded_weights,
    write_companions,
)
from megatron_opd.parallel import Parallel
from megatron_opd.step import Student
from megatron_opd.teacher.ema import EmaTeacher

# the only sharding of the optimiser that may be resumed in another layout
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(
    folder: Path,
    student: Student,
    state: dict[str, Any],
    *,
    keep: int,
    source: HFConfig,
    stop_ids: tuple[int, ...] = (),
    averages: Mapping[str, EmaTeacher] | None = None,
) -> Path:
    """Write `folder/step_NNNNNN` and delete all but the newest `keep`; collective.

    `state` is JSON: `step`, the data cursor, whatever else resume needs. `source` and `stop_ids`
    are those of `save_hf`: tools/convert_checkpoint.py makes a Hugging Face model of it with them.
    `averages` are the teachers, by name, whose weights change with the student's.
    """
    parallel, name = student.parallel, f"step_{state['step']:06d}"
    final, draft = folder / name, folder / f"tmp_{name}"
    parallel.owner(lambda: _fresh(draft))
    fork_checkpoint_writer()
    averages = averages or {}
    with student.states():
        dist_checkpointing.save(_sharded(student, averages, loading=False), str(draft))
    kept = {**state, "averages": sorted(averages)} if averages else state

    def publish() -> None:
        (draft / "state.json").write_text(json.dumps(kept, indent=2))
        write_companions(source, draft, student.model.config.params_dtype, stop_ids)
        shutil.rmtree(final, ignore_errors=True)  # of an earlier try at this step
        draft.rename(final)
        for old in sorted(folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old)

    parallel.owner(publish)
    return final


def load(
    path: Path, student: Student, averages: Mapping[str, EmaTeacher] | None = None
) -> dict[str, Any]:
    """Restore weights, optimiser and schedule from `path`; return its `state`; collective.

    Raises:
        ValueError: `path` was saved with other `averages`.
    """
    averages = averages or {}
    state = student.parallel.owner(lambda: json.loads((path / "state.json").read_text()))
    kept = state.pop("averages", [])
    if set(kept) != set(averages):
        raise ValueError(
            f"{path}: it has {_counted(kept)}, but {_counted(averages)} are wanted; resume with "
            "the teachers that it was saved with, or start another run.dir"
        )
    _patch_distributed_optimizer()
    with student.states():
        _before_load(student.optimizer)
        wanted = _sharded(student, averages, loading=True)
        loaded: Any = dist_checkpointing.load(wanted, str(path))
        student.model.load_state_dict(loaded["model"])
        for i, optimizer in _parts(student.optimizer).items():
            part = loaded["optimizer"].get(i, {})
            optimizer.load_state_dict(_regroup(part, wanted["optimizer"][i], state["step"]))
        for name, teacher in averages.items():
            teacher.restore([loaded[_prefix(name)][i] for i in range(len(teacher.masters))])
        _after_load(student.optimizer)
    student.scheduler.num_steps = 0
    student.scheduler.step(state["step"])
    return state


def _counted(averages: Iterable[str]) -> str:
    names = ", ".join(f"teachers.{name}" if name else "teacher" for name in sorted(averages))
    return f"running means (weights=ema) of {names}" if names else "no running means (weights=ema)"


def latest(folder: Path, parallel: Parallel) -> Path | None:
    """Return the newest complete checkpoint in `folder`, as rank 0 sees it."""
    return parallel.owner(lambda: max(folder.glob("step_*"), default=None))


def _sharded(
    student: Student, averages: Mapping[str, EmaTeacher], *, loading: bool
) -> dict[str, Any]:
    model = sharded_weights(student.model)
    how = {"is_loading": loading, "metadata": METADATA}
    parts = {
        i: part.sharded_state_dict(model, **how) for i, part in _parts(student.optimizer).items()
    }
    # they lie as the student's weights do, as the states of an optimiser would
    places = get_param_id_to_sharded_param_map(model, student.model.parameters())
    means = {
        _prefix(name): {
            index: make_sharded_optimizer_tensor(places[index], master, _prefix(name))
            for index, master in enumerate(teacher.masters)
        }
        for name, teacher in averages.items()
    }
    return {"model": model, "optimizer": parts, **means}


def _regroup(part: dict[str, Any], wanted: dict[str, Any], step: int) -> dict[str, Any]:
    """Return what was loaded of an optimiser with its own groups, after so many updates.

    Those that were saved may be of another number (see `_parts`). What else groups hold is the
    config's and the schedule's to say.
    """
    part = {**wanted, **part}
    held = part["optimizer"] if "optimizer" in wanted else part
    held["param_groups"] = [
        {k: v.unwrap() if isinstance(v, LocalNonpersistentObject) else v for k, v in group.items()}
        for group in wanted.get("optimizer", wanted)["param_groups"]
    ]
    for group in held["param_groups"]:
        if "step" in group:
            group["step"] = type(group["step"])(step)
    if "state" in held:  # of one that is not distributed
        held["state"]["common_step"] = torch.tensor(float(step))
    return part


def _prefix(name: str) -> str:
    return f"ema.{name}" if name else "ema"


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left half written
    folder.mkdir(parents=True)


# Without Transformer Engine and Apex, Megatron's distributed optimiser runs torch's AdamW, which
# keeps one `step` tensor per parameter where theirs keeps one number. Three repairs for that:


def _patch_distributed_optimizer() -> None:
    """Hand `step` through distrib_optimizer.py:939, which copies every state key but gets none."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "passes_step", False):
        return

    @torch.no_grad()
    def set_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = {"step": state["step"]} if "step" in state else {}
        original(self, model_param, {**tensors, **step})

    set_states.passes_step = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _parts(optimizer: Any) -> dict[int, Any]:
    """Return the optimisers that one consists of, by their numbers, but for those of nothing.

    With ep > 1 experts have one of their own, and a stage may have none of them.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return {i: part for i, part in enumerate(chained) if part.get_parameters()}


def _torch_adamws(optimizer: Any):
    for part in _parts(optimizer).values():
        if isinstance(getattr(part, "optimizer", None), torch.optim.Adam | torch.optim.AdamW):
            yield part.optimizer


def _before_load(optimizer: Any) -> None:
    """Create the state that the loader fills: state_dict() asserts one common step (:641)."""
    for adamw in _torch_adamws(optimizer):
        for group in adamw.param_groups:
            for p in group["params"]:
                if not adamw.state[p]:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    adamw.state[p].update(step=torch.tensor(0.0), **zeros)


def _after_load(optimizer: Any) -> None:
    """Give every parameter its own step again: sharing one (:825), it would advance by N."""
    for adamw in _torch_adamws(optimizer):
        for state in adamw.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
