"""Convert a checkpoint between Hugging Face and Megatron, on the CPU, at any tp × pp."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: conversion never takes a GPU

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from megatron_opd import parallel as mesh
from megatron_opd.model import build_model, check_layout, load_hf, read_config, save_hf
from megatron_opd.model.hf_files import TensorFiles
from megatron_opd.model.torch_dist import HF, load_megatron, save_megatron

DESCRIPTION = """\
Convert a checkpoint between Hugging Face safetensors and Megatron-Core torch_dist, bit by bit:
the dtype is kept. Works on the CPU and starts its tp × pp processes itself; a Megatron checkpoint
written at one layout loads at any other."""
EXAMPLES = """\
examples:
  %(prog)s hf-to-megatron Qwen3-0.6B qwen3-megatron --tp 2
  %(prog)s megatron-to-hf qwen3-megatron qwen3-hf"""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, text in (
        (
            "hf-to-megatron",
            "read safetensors, write torch_dist (config and tokenizer go to DST/hf)",
        ),
        ("megatron-to-hf", "read torch_dist, write a folder that from_pretrained loads"),
    ):
        sub = kinds.add_parser(kind, help=text, description=text)
        sub.add_argument("src", type=Path, help="checkpoint folder to read")
        sub.add_argument("dst", type=Path, help="folder to write; must not exist")
        sub.add_argument("--tp", type=int, default=1, help="tensor-parallel processes (default 1)")
        sub.add_argument(
            "--pp", type=int, default=1, help="pipeline-parallel processes (default 1)"
        )
    return parser.parse_args(argv)


def convert(parallel: mesh.Parallel, args: argparse.Namespace) -> None:
    """Read SRC and write DST; collective."""
    if args.kind == "hf-to-megatron":
        dtype = TensorFiles(args.src).dtype()
        model = build_model(args.src, parallel, dtype=dtype, seed=None)
        load_hf(model, args.src, parallel)
        save_megatron(model, args.src, args.dst, parallel)
    else:
        source = args.src / HF
        dtype = getattr(torch, read_config(source)["dtype"])
        model = build_model(source, parallel, dtype=dtype, seed=None)
        load_megatron(model, args.src, parallel)
        save_hf(model, source, args.dst, parallel)


def check(args: argparse.Namespace) -> None:
    """Find what the user got wrong before any process starts.

    Raises:
        ValueError: one line: key, got, expected.
    """
    if args.dst.exists():
        raise ValueError(f"DST={args.dst} exists; remove it or choose another name")
    if args.kind == "hf-to-megatron":
        check_layout(args.src, args.tp, args.pp)
        TensorFiles(args.src).dtype()
    elif not (args.src / "metadata.json").exists():
        raise ValueError(f"SRC={args.src}: has no metadata.json, expected a Megatron checkpoint")
    else:
        check_layout(args.src / HF, args.tp, args.pp)


def _rank(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    world = args.tp * args.pp
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    url = f"file://{rendezvous}/store"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world)
    try:
        convert(mesh.initialize(args.tp, args.pp), args)
    except ValueError as problem:  # known to all ranks
        (Path(rendezvous) / "error").write_text(str(problem))
    mesh.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    args = arguments(argv)
    try:
        check(args)
        with tempfile.TemporaryDirectory() as rendezvous:
            world = args.tp * args.pp
            start_processes(_rank, (args, rendezvous), nprocs=world, start_method="fork")
            error = Path(rendezvous) / "error"
            if error.exists():
                raise ValueError(error.read_text())
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
