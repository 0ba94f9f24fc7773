"""torchrun's ranks → Megatron's process groups → `Parallel`, and how ranks agree.

Ranks form a mesh `arange(world).view(pp, dp, cp, tp)`: tensor-parallel peers are neighbours,
pipeline stages are furthest apart. One *replica* is the tp × cp × pp ranks that have the same
responses. Experts are spread otherwise: the tp · cp · dp ranks of a stage are
`view(expert_dp, ep, etp)`. A frozen model may have another mesh of the same ranks.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_opd import platform

platform.activate()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402

T = TypeVar("T")
_ALONE = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}


@dataclass(frozen=True)
class Parallel:
    """Where this rank sits in the mesh, and the groups it belongs to."""

    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    etp: int
    vpp: int  # chunks of layers on every pipeline stage
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    ep_rank: int
    etp_rank: int
    device: torch.device
    tp_group: Any
    pp_group: Any
    dp_group: Any  # replicas, which have other responses
    cp_group: Any  # each has a part of every sequence
    ep_group: Any  # each has some of the experts
    etp_group: Any
    replica_group: Any  # the tp × cp × pp ranks of one replica
    copy_group: Any  # the tp × pp ranks of one copy of the model: cp copies make a replica
    sequence_parallel: bool = False
    # what Megatron knows of this mesh: it keeps one, in the globals of a module
    globals: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let this mesh be the one that Megatron's functions ask for; afterwards that of before."""
        before = _globals()
        _set_globals(self.globals)
        try:
            yield
        finally:
            _set_globals(before)

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.cp * self.pp

    @property
    def is_replica_first(self) -> bool:
        """The first rank of its replica: speaks for it."""
        return self.tp_rank == self.cp_rank == self.pp_rank == 0

    @property
    def is_main(self) -> bool:
        """Rank 0: writes files and speaks to the user."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def head_rank(self) -> int:
        """Global rank of this replica's last pipeline stage, first in its tp and cp groups."""
        return ((self.pp - 1) * self.dp + self.dp_rank) * self.cp * self.tp

    @property
    def copy_head_rank(self) -> int:
        """Global rank of this model copy's last pipeline stage, first in its tp group."""
        return self.head_rank + self.cp_rank * self.tp

    @property
    def shares_experts(self) -> bool:
        """Whether copies of the model compute each other's experts: they must run in step."""
        return self.ep * self.etp > self.tp

    @property
    def exports(self) -> bool:
        """Whether the model is not written out without this rank: it is of the first replica, or
        holds experts that the first one has not."""
        return self.dp_rank == 0 or self.shares_experts

    def place(self, layer: int, layers: int) -> tuple[int, int]:
        """Return the pipeline stage, and the chunk of it, that hold one of so many layers."""
        return place(layer, layers, self.pp, self.vpp)

    def owner(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 alone and return its value, or raise its error, everywhere."""
        box = [self.main_only(function)]
        dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def main_only(self, function: Callable[[], T]) -> T | None:
        """Run `function` on rank 0 and keep its value there; raise its error everywhere."""
        kept: list[T] = []
        self.agree(lambda: kept.append(function()), ranks=(0,))
        return kept[0] if kept else None

    def agree(self, function: Callable[[], T], ranks: tuple[int, ...] | None = None) -> list[T]:
        """Run `function` on `ranks` (default: all) and return all their picklable values.

        If any rank raises `ValueError` or `OSError`, every rank raises one `ValueError` with the
        first such message: an error is never known to one rank while the others wait for it.
        """
        value, problem = None, None
        if ranks is None or self.rank in ranks:
            try:
                value = function()
            except (ValueError, OSError) as error:
                problem = error
        seen: list[Any] = [None] * self.world
        dist.all_gather_object(seen, (value, None if problem is None else str(problem)))
        for _, message in seen:
            if message is not None:
                raise ValueError(message) from problem
        return [value for value, _ in seen]


def place(layer: int, layers: int, pp: int, vpp: int = 1) -> tuple[int, int]:
    """Return (stage, chunk) of a layer: equal chunks are dealt out to the stages in turn."""
    virtual = layer * pp * vpp // layers
    return virtual % pp, virtual // pp


def check_layout(
    world: int,
    tp: int,
    pp: int,
    *,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    key: str = "parallel",
) -> int:
    """Return the data-parallel size; `key` is the section of the config that has the axes.

    Raises:
        ValueError: tp × cp × pp does not divide the ranks, or ep × etp those of a stage.
    """
    if world % (tp * cp * pp):
        wanted, axes = f"tp={tp} × pp={pp}", f"{key}.tp / {key}.pp"
        if cp > 1:
            wanted, axes = f"tp={tp} × cp={cp} × pp={pp}", f"{axes} / {key}.cp"
        raise ValueError(
            f"{key}: {wanted} needs a multiple of {tp * cp * pp} ranks, got {world}; "
            f"change --nproc-per-node or {axes}"
        )
    etp = etp or tp
    if world // pp % (ep * etp):
        raise ValueError(
            f"{key}: ep={ep} × etp={etp} needs a multiple of {ep * etp} ranks on each of "
            f"{pp} pipeline stages, got {world // pp}; change {key}.ep or {key}.etp"
        )
    return world // (tp * cp * pp)


def initialize(
    tp: int = 1,
    pp: int = 1,
    *,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    vpp: int = 1,
    sequence_parallel: bool = False,
    seed: int = 0,
    timeout_minutes: int = 30,
) -> Parallel:
    """Join the process group (torchrun's environment, or a world of one) and build the mesh.

    `etp` is the tensor-parallel size inside an expert; None: `tp`.

    Raises:
        ValueError: the axes do not divide the number of ranks.
    """
    world, device = int(os.environ.get("WORLD_SIZE", 1)), platform.device()
    check_layout(world, tp, pp, cp=cp, ep=ep, etp=etp)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        for name, value in _ALONE.items():
            os.environ.setdefault(name, str(value))
        os.environ.setdefault("MASTER_PORT", "0" if world == 1 else "29500")
        dist.init_process_group(platform.backend(), timeout=timedelta(minutes=timeout_minutes))
    axes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "vpp": vpp}
    parallel = _mesh(**axes, sequence_parallel=sequence_parallel, timeout_minutes=timeout_minutes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return parallel


def another(
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    vpp: int = 1,
    sequence_parallel: bool = False,
    timeout_minutes: int = 30,
) -> Parallel:
    """Build one more mesh of all ranks, for a frozen model; collective.

    Which mesh is current does not change, nor do random numbers: its models are built and run in
    `with mesh.current()`.

    Raises:
        ValueError: the axes do not divide the number of ranks.
    """
    check_layout(dist.get_world_size(), tp, pp, ep=ep, etp=etp)
    before = _globals()
    # Megatron refuses to initialise what is there; its buffer is scratch memory, which all may use
    _set_globals({name: {} if isinstance(old, dict) else None for name, old in before.items()})
    axes = {"tp": tp, "pp": pp, "cp": 1, "ep": ep, "etp": etp, "vpp": vpp}
    try:
        made = _mesh(**axes, sequence_parallel=sequence_parallel, timeout_minutes=timeout_minutes)
    finally:
        _set_globals(before)
    scratch = {"_GLOBAL_MEMORY_BUFFER": before["_GLOBAL_MEMORY_BUFFER"]}
    return replace(made, globals={**made.globals, **scratch})


def _globals() -> dict[str, Any]:
    """Return what Megatron keeps of the current mesh."""
    return {name: x for name, x in vars(mpu).items() if name.startswith("_") and name.isupper()}


def _set_globals(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(mpu, name, value)


def _mesh(
    *,
    tp: int,
    pp: int,
    cp: int,
    ep: int,
    etp: int | None,
    vpp: int,
    sequence_parallel: bool,
    timeout_minutes: int,
) -> Parallel:
    """Have Megatron make its groups, and say where this rank is in them."""
    dp = dist.get_world_size() // (tp * pp * cp)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        distributed_timeout_minutes=timeout_minutes,
    )
    return Parallel(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=ep,
        etp=etp or tp,
        vpp=vpp,
        rank=dist.get_rank(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        ep_rank=mpu.get_expert_model_parallel_rank(),
        etp_rank=cast(int, mpu.get_expert_tensor_parallel_rank()),
        device=platform.device(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        ep_group=mpu.get_expert_model_parallel_group(),
        etp_group=mpu.get_expert_tensor_parallel_group(),
        replica_group=_replica_group(tp, pp, cp, dp),
        copy_group=mpu.get_model_parallel_group(),
        sequence_parallel=sequence_parallel and tp > 1,
        globals=_globals(),
    )


def _replica_group(tp: int, pp: int, cp: int, dp: int) -> Any:
    """Return Megatron's tp × pp group, or with context parallelism, which it counts out, ours."""
    if cp == 1:
        return mpu.get_model_parallel_group()
    mesh = torch.arange(tp * pp * cp * dp).view(pp, dp, cp * tp)
    groups = [dist.new_group(mesh[:, replica].flatten().tolist()) for replica in range(dp)]
    return groups[mpu.get_data_parallel_rank()]


def shutdown() -> None:
    """Leave every process group."""
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
