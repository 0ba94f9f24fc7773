"""Show a phenomenon of "Rethinking On-Policy Distillation" on models made on the spot.

python examples/rethinking_opd/run.py FIGURE [FIGURE ...] [--seeds 0 1 2] [section.key=value ...]

Words with a `=` go to every distillation. Runs are kept in runs/rethinking_opd and shared by the
figures; a run whose settings are others than last time is trained again.
"""

import argparse
import os
import sys
from pathlib import Path

# one process on one core: tiny matrices gain nothing from threads
os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parents[2]))  # for examples.…, which is not installed

from examples.rethinking_opd.figures import FIGURES
from examples.rethinking_opd.lab import Lab
from examples.rethinking_opd.report import report

ROOT = Path("runs/rethinking_opd")


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Train what the figures need and has not been trained, then print and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_listed()
    )
    parser.add_argument("words", nargs="+", metavar="FIGURE | section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    names = [word for word in options.words if word not in overrides]
    unknown = [name for name in names if name not in (*FIGURES, "all")]
    if unknown or not names:
        found = unknown[0] if unknown else "none"
        print(
            f"error: figure: got '{found}', expected {', '.join(FIGURES)} or all", file=sys.stderr
        )
        return 2
    labs = [Lab(root / f"seed_{seed}", seed, overrides) for seed in dict.fromkeys(options.seeds)]
    for name in FIGURES if "all" in names else names:
        print(f"\n{report(name, labs, root)}\n", flush=True)
    return 0


def _listed() -> str:
    lines = [f"  {name:<14} {f.title} ({f.paper})" for name, f in FIGURES.items()]
    return "figures, or all:\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
