"""Hugging Face checkpoint folders on disk: slices read lazily, and what is not weights."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_opd.model.config import DTYPES, HFConfig, read_config, read_json
from megatron_opd.model.hf_map import Shape

CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAPPED_BYTES = 1 << 27
_PIECE = 1 << 24  # numbers that are looked at in one go
# what belongs to a model besides its weights and config.json
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


class TensorFiles:
    """The safetensors of one checkpoint folder. Only headers are read until `read` is called."""

    def __init__(self, folder: str | Path):
        """Open every file.

        Raises:
            ValueError: no safetensors, a file or an index that cannot be read or is cut off, or a
                file that the index names is absent.
        """
        self.folder = Path(folder)
        self.bytes_read = 0
        self._headers: dict[str, tuple[Path, Shape, str]] = {}
        self._open: tuple[Path, Any] | None = None
        self._left = 0  # bytes to read from it
        for file in self.files():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  it is no mapping
                        header = opened.get_slice(name)
                        shape, dtype = tuple(header.get_shape()), header.get_dtype()
                        self._headers[name] = file, shape, dtype
            except (OSError, SafetensorError) as problem:
                raise ValueError(f"{file}: not a readable safetensors file: {problem}") from None

    def files(self) -> list[Path]:
        single, index = (self.folder / f"model.safetensors{end}" for end in ("", ".index.json"))
        if not index.exists() and not single.exists():
            raise ValueError(f"{self.folder}: has neither {single.name} nor {index.name}")
        if not index.exists():
            return [single]
        file_of = read_json(index, "an index of safetensors").get("weight_map")
        named = isinstance(file_of, dict) and all(isinstance(x, str) for x in file_of.values())
        if not named or not file_of:
            raise ValueError(f"{index}: has no weight_map, expected one from tensor to file names")
        files = sorted(set(file_of.values()))
        absent = [name for name in files if not (self.folder / name).exists()]
        if absent:
            raise ValueError(f"{index}: names files that are missing: {some(absent)}")
        return [self.folder / name for name in files]

    def shape(self, name: str) -> Shape:
        return self._headers[name][1]

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises:
            ValueError: it is not a floating-point dtype of a model.
        """
        file, _, dtype = self._headers[name]
        if dtype not in CODES:
            raise ValueError(f"{file}: {name} has dtype {dtype}, expected {', '.join(CODES)}")
        return CODES[dtype]

    def check(
        self, expected: Mapping[str, Shape], free_rows: set[str], spare: tuple[str, ...] = ()
    ) -> None:
        """Compare names and shapes before anything is read; rows of `free_rows` may differ.

        There may be tensors besides whose names begin with one of `spare`.

        Raises:
            ValueError: tensors are missing, unknown or of another shape; names them.
        """
        problems = {
            "missing": [name for name in expected if name not in self._headers],
            "unknown": [
                name
                for name in self._headers
                if name not in expected and not _ignored(name) and not name.startswith(spare)
            ],
            "wrong shape": [
                f"{name} {list(self.shape(name))} (expected {list(shape)})"
                for name, shape in expected.items()
                if name in self._headers and not self._fits(name, shape, name in free_rows)
            ],
        }
        told = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        if told:
            raise ValueError(f"{self.folder}: tensors do not fit config.json: {told}")

    def any_begins(self, prefixes: tuple[str, ...]) -> bool:
        """Say whether there is a tensor whose name begins with one of `prefixes`."""
        return any(name.startswith(prefixes) for name in self._headers)

    def _fits(self, name: str, shape: Shape, free_rows: bool) -> bool:
        first = 1 if free_rows else 0
        return self.shape(name)[first:] == shape[first:]

    def read(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """Read `start:stop` along `dim` (None: the whole tensor), and nothing else."""
        piece = self._opened(self._headers[name][0]).get_slice(name)
        if dim is None:
            tensor = piece[:]
        elif dim == 0:
            tensor = piece[start:stop]
        else:
            tensor = piece[:, start:stop]
        self._left -= tensor.nbytes
        self.bytes_read += tensor.nbytes
        return tensor

    def _opened(self, file: Path) -> Any:
        """Return the open file, opened anew at times: what is read of a mapped file stays there."""
        if self._open is None or self._open[0] != file or self._left < 0:
            self._open, self._left = (file, safe_open(file, framework="pt")), _MAPPED_BYTES
        return self._open[1]


def _ignored(name: str) -> bool:
    """Rotary tables and second copies of a tied embedding: transformers skips them as well."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def sane(tensor: Tensor, name: str, *, may_be_zero: bool = False) -> Tensor:
    """Refuse what an interrupted download or a lost offload leaves behind.

    Raises:
        ValueError: values are not finite, or all are zero.
    """
    pieces = tensor.split(max(1, _PIECE // max(1, tensor[:1].numel())))
    zero = [scan(piece, name) for piece in pieces]
    if all(zero) and tensor.numel() and not may_be_zero:
        raise ValueError(f"{name} is all zero")
    return tensor


def scan(piece: Tensor, name: str) -> bool:
    """Say whether all of a part of a tensor is zero.

    Raises:
        ValueError: values are not finite.
    """
    total = piece.sum(dtype=torch.float32)  # several times as fast as to look at each of them
    if not torch.isfinite(total) and not torch.isfinite(piece).all():
        raise ValueError(f"{name} has values that are not finite")
    return not total and not piece.any()


def fresh_folder(draft: Path, final: Path) -> None:
    """Create `draft`, empty, to be renamed to `final`.

    Raises:
        ValueError: `final` exists.
    """
    if final.exists():
        raise ValueError(f"{final} exists; remove it or choose another name")
    shutil.rmtree(draft, ignore_errors=True)  # what a killed run left half written
    draft.mkdir(parents=True)


def write_description(
    source: HFConfig, folder: Path, dtype: torch.dtype, stop_ids: tuple[int, ...] = ()
) -> None:
    """Write all of a Hugging Face folder but the weights.

    `config.json` gets the dtype that the weights have, under the key it uses. If `source` is a
    folder, its generation defaults and tokenizer come along. A generation by these defaults ends
    with any of `stop_ids` too.

    Raises:
        ValueError: a file of `source` cannot be read.
    """
    config = read_config(source)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    _write_json(folder / "config.json", {**config, key: _NAMES[dtype]})
    if not isinstance(source, Mapping):
        _copy_companions(Path(source), folder)
    if stop_ids:
        _add_stops(folder / "generation_config.json", config, stop_ids)


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _add_stops(file: Path, config: Mapping[str, Any], stop_ids: tuple[int, ...]) -> None:
    """Add to the ids that end a generation; without the file, `config.json` has held them."""
    if file.exists():
        defaults = read_json(file, "generation defaults")
    else:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        defaults = {key: config[key] for key in keys if config.get(key) is not None}
    known = defaults.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    _write_json(file, {**defaults, "eos_token_id": sorted({*known, *stop_ids})})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
