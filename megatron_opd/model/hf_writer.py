"""Write safetensors one tensor at a time, in shards with an index."""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opd.model.hf_files import CODES
from megatron_opd.model.hf_map import Shape

_CODE_OF = {dtype: code for code, dtype in CODES.items()}
TensorKind = tuple[torch.dtype, Shape]


class SafetensorsFile:
    """Write one safetensors file, a tensor at a time; it has its name once it is whole.

    The library's own `save_file` wants all of them in memory. The format: the length of the header
    as u64, the header (JSON: dtype, shape, begin and end of every tensor), the tensors.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorKind]):
        """Lay out `tensors`: name → (dtype, shape). They may be added in any order.

        Raises:
            OSError: it cannot be written, here or in `add`.
        """
        self.path, self.draft = path, path.with_name(f"tmp_{path.name}")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # wide types first, so that each tensor is aligned
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            names = {"dtype": _CODE_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            header[name] = names
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.start = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
        self.file = self.draft.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)

    def add(self, name: str, tensor: Tensor) -> None:
        self.file.seek(self.start.pop(name))
        flat = tensor.detach().cpu().contiguous().view(-1)
        self.file.write(flat.view(torch.uint8).numpy().data)

    def close(self) -> None:
        assert not self.start, "every planned tensor was added"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.draft.rename(self.path)


class ShardWriter:
    """Write tensors that arrive in manifest order as numbered safetensors and their index."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorKind], max_shard_bytes: int):
        """Plan the shards: `tensors` is name → (dtype, shape), in order."""
        self.folder, self.tensors = folder, dict(tensors)
        shards: list[list[str]] = [[]]
        used = 0
        for name, (dtype, shape) in tensors.items():
            size = dtype.itemsize * math.prod(shape)
            if used and used + size > max_shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
        self.shards = {self._file(i, len(shards)): names for i, names in enumerate(shards)}
        self.left = dict(self.shards)
        self.open: SafetensorsFile | None = None

    def _file(self, shard: int, shards: int) -> str:
        if shards == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"

    def begin(self, file: str) -> SafetensorsFile:
        """Begin one of the `shards`."""
        kinds = {name: self.tensors[name] for name in self.shards[file]}
        return SafetensorsFile(self.folder / file, kinds)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor, and write it.

        Raises:
            OSError: the disk is full.
        """
        file = next(iter(self.left))
        if self.open is None:
            self.open = self.begin(file)
        self.open.add(name, tensor)
        if name == self.shards[file][-1]:
            self.open.close()
            self.open = None
            del self.left[file]

    def finish(self) -> None:
        """Write the index, when there is more than one shard."""
        assert not self.left, "every planned tensor was added"
        self.write_index()

    def write_index(self) -> None:
        if len(self.shards) > 1:
            sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors.values()]
            files = {name: file for file, names in self.shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": files}
            text = json.dumps(index, indent=2)
            (self.folder / "model.safetensors.index.json").write_text(text)
