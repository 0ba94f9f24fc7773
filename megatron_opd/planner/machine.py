"""GPUs as their data sheets describe them, and which part of that a run gets."""

from dataclasses import dataclass, fields, replace

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight: peak rates of its data sheet."""

    flops: float  # bfloat16 operations a second, dense
    memory: float  # bytes
    hbm: float  # bytes a second, of its memory
    nvlink: float  # bytes a second to the other GPUs of its node, in one direction
    network: float  # bytes a second to other nodes, in one direction: one network card a GPU
    host: float  # bytes a second to the host's memory, in one direction


# NVIDIA's data sheets of the A100, H100, H200 (SXM) and of the HGX B200; half of NVLink's total,
# which counts both directions; the cards of the DGX of each: 200, 400, 400 and 400 Gbit/s;
# 16 lanes of PCIe 4 and 5
GPUS = {
    "a100-40": Gpu(312 * TERA, 40 * GB, 1.555 * TERA, 300 * GB, 25 * GB, 32 * GB),
    "a100-80": Gpu(312 * TERA, 80 * GB, 2.039 * TERA, 300 * GB, 25 * GB, 32 * GB),
    "h100": Gpu(989 * TERA, 80 * GB, 3.35 * TERA, 450 * GB, 50 * GB, 64 * GB),
    "h200": Gpu(989 * TERA, 141 * GB, 4.8 * TERA, 450 * GB, 50 * GB, 64 * GB),
    "b200": Gpu(2250 * TERA, 180 * GB, 8.0 * TERA, 900 * GB, 50 * GB, 64 * GB),
}


@dataclass(frozen=True)
class Achieved:
    """What is assumed to be left of the peak rates; times in seconds."""

    train: float = 0.40  # of the operations, in forward and backward
    score: float = 0.45  # in the teacher's forward
    prefill: float = 0.45  # where prompts are read
    hbm: float = 0.65  # of the memory's rate, in decoding and in the optimizer
    link: float = 0.70  # of NVLink, network and PCIe
    memory: float = 0.90  # of the bytes, that a run may fill
    latency_s: float = 15e-6  # of a collective, or of a layer in decoding


def assumptions(words: str) -> Achieved:
    """Return the assumptions with some of them set, as in "train=0.35,hbm=0.6".

    Raises:
        ValueError: not a number, out of range, or not an assumption.
    """
    known, chosen = [field.name for field in fields(Achieved)], {}
    for word in filter(None, words.split(",")):
        name, _, text = word.partition("=")
        if name not in known:
            raise ValueError(f"--assume: no such word '{name}', expected {', '.join(known)}")
        try:
            chosen[name] = float(text)
        except ValueError:
            raise ValueError(f"--assume {name}: got '{text}', expected a number") from None
        if not 0 < chosen[name] <= 1:
            raise ValueError(f"--assume {name}: got {text}, expected more than 0 and at most 1")
    return replace(Achieved(), **chosen)
