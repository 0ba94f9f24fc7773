"""Memory that is needed in one phase only: tensors go to pinned host memory, buffers are emptied.

Between two updates nobody looks at gradients and optimizer states, between two judgements nobody at
a teacher's weights; rollouts and the other model's activations have that room meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Offloaded:
    """Tensors in host memory, pinned for a GPU; on their device from `fetch` to `release`.

    Each must own its memory. What the device changes in between is lost: release is a dropped
    pointer, not a transfer. A released tensor has no entries.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        self.host = [_on_host(tensor) for tensor in tensors]
        self.devices = [tensor.device for tensor in tensors]
        self.release()

    def fetch(self) -> None:
        """Copy the tensors to their devices, without waiting."""
        for tensor, host, device in zip(self.tensors, self.host, self.devices, strict=True):
            # of a host tensor on a CPU, a copy too: what is changed there must not be kept here
            tensor.data = host.to(device, non_blocking=True, copy=True)

    def release(self) -> None:
        """Give the memory on the devices back."""
        for tensor in self.tensors:
            tensor.data = tensor.data.new_empty(0)


class UpdateMemory:
    """What only an update needs, of Megatron's optimizer and its gradient buffers.

    Gradients are given back, as they start from zero; fp32 main weights and Adam's means rest in
    host memory. Main weights that the model itself computes with (an fp32 model's) stay.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any, device: torch.device):
        self.chunks, self.optimizer, self.device = chunks, optimizer, device
        self.states: Offloaded | None = None
        self.release()

    def make_gradients(self) -> None:
        """Allocate the gradient buffers; they are zero."""
        for chunk in self.chunks:
            chunk.restore_grad_buffers()

    def fetch_states(self) -> None:
        """Bring the optimizer's tensors back: for the update itself, when activations are gone."""
        if self.states is not None:
            self.states.fetch()
            self.states = None  # the host's memory stays pinned for the next time, in torch's cache

    def release(self) -> None:
        """Give all of it back to the device."""
        self.optimizer.zero_grad()  # they look into the buffers
        self._release_states()
        for chunk in self.chunks:
            chunk.offload_grad_buffers()  # gives the allocator's unused memory back besides

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the optimizer's tensors on the device while somebody reads or replaces them."""
        self.fetch_states()
        yield
        self._release_states()

    def _release_states(self) -> None:
        if self.states is None:
            # named anew: Adam makes its means at the first update, and loading exchanges them
            self.states = Offloaded(self.own_tensors())

    def own_tensors(self) -> list[Tensor]:
        """Return the optimizer's tensors that nobody else looks at."""
        models = {_memory(p) for chunk in self.chunks for p in chunk.parameters()}
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        found = []
        for inner in (part.optimizer for part in parts if part.optimizer is not None):
            found += [p for group in inner.param_groups for p in group["params"]]
            found += [x for state in inner.state.values() for x in state.values()]
        return [
            x
            for x in found
            if isinstance(x, Tensor) and x.device == self.device and _memory(x) not in models
        ]


def _on_host(tensor: Tensor) -> Tensor:
    assert tensor.untyped_storage().nbytes() == tensor.nbytes, "another tensor's memory"
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return host.copy_(tensor.detach())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
