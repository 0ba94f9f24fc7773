"""vLLM's worker on a CPU; the CUDA build need not be able to import it."""

import secrets
from pathlib import Path

import torch.distributed as dist
from vllm.v1.worker.cpu_worker import CPUWorker


class CpuWorker(CPUWorker):
    """A worker whose shared memory belongs to one job, and ends with it however it ends.

    vLLM names that memory after the end of the init method, which is "env://" for every job under
    torchrun: two on a host would share it, and what one that was killed left behind stops the next.
    """

    def __init__(self, *args, distributed_init_method: str, **kwargs):
        told = [secrets.token_hex(8)]
        dist.broadcast_object_list(told)
        self.job = told[0]
        method = f"{distributed_init_method}:{self.job}"
        super().__init__(*args, distributed_init_method=method, **kwargs)

    def init_device(self) -> None:
        """Join the groups; by then every rank has mapped the memory, and its name can go."""
        super().init_device()
        for file in Path("/dev/shm").glob(f"{self.job}-*"):
            file.unlink(missing_ok=True)
