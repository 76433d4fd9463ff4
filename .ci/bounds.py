"""Do the tests still pass at both ends of each dependency's range, and which upstream release broke what?

    python .ci/bounds.py --list                    # what would be installed
    python .ci/bounds.py transformers trl          # try these two, lowest and newest; needs a package index and time
    python .ci/bounds.py --tests tests/unit/models tests/contracts

Each end gets an environment of its own in a temporary folder: everything as constraints.txt has it but for that one package and what it
pins itself; run it with the environment's own Python. Printed are the version that was installed and what pytest said last, or the first
thing that failed. Kept: benchmarks/results/bounds_cpu.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "vllm")
_TORCH = ("torchvision", "torchaudio", "torchcodec", "torchdata")
TOGETHER = {"torch": _TORCH, "vllm": ("torch", *_TORCH)}
"""Package → others whose every release is built for one of its releases."""
EXTRAS = {"vllm": "serve"}
TESTS = (
    "tests/contracts",
    "tests/unit/models",
    "tests/unit/processing",
    "tests/unit/train",
    "tests/unit/serve/test_vllm_private.py",
)


def bounds() -> dict[str, tuple[str, str]]:
    """Package → (its lowest version as pyproject.toml states it, its whole specifier)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    found: dict[str, tuple[str, str]] = {}
    for line in stated:
        name, specifier = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?(.*)", line).groups()  # type: ignore[union-attr]
        lowest = re.search(r"[>=]=([\w.]+)", specifier)
        if name in PACKAGES and lowest is not None:
            found[name] = (lowest[1], specifier)
    return found


def ends(name: str) -> list[str]:
    """What is asked of the installer for the lowest and for the newest version."""
    lowest, specifier = bounds()[name]
    return [f"{name}=={lowest}.*" if lowest.count(".") < 2 else f"{name}=={lowest}", f"{name}{specifier}"]


def held_beside(name: str) -> list[str]:
    """constraints.txt without the package, what it pins itself (transformers asks for certain tokenizers) and what is built for it."""
    own = {_plain(line) for line in _requires(name) if "extra ==" not in line} - set(PACKAGES)
    free = own | {name} | set(TOGETHER.get(name, ()))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not own:  # not installed here: what it asks for is not known, so only the others of this list are held
        lines = [line for line in lines if _plain(line) in PACKAGES]
    cuda = ("nvidia-", "cuda-") if "torch" in free else ()
    return [line for line in lines if _plain(line) not in free and not _plain(line).startswith(cuda)]


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _plain(requirement: str) -> str:
    return re.split(r"[\[=<>!~; ]", requirement.strip())[0].lower().replace("_", "-")


def attempt(requirement: str, newest: bool, tests: list[str], tried: set[str]) -> tuple[bool, str]:
    """Install and test. (whether all passed, the version that was installed with what pytest said last, or the first failure). tried:
    versions that were tested already, which is not done again."""
    name = re.split(r"[=<>]", requirement)[0]
    folder = Path(tempfile.mkdtemp(prefix="mllm-bounds-"))
    try:
        python = folder / "venv/bin/python"
        (folder / "held.txt").write_text("\n".join(held_beside(name)))
        extras = ",".join(filter(None, ("train", "eval", "dev", EXTRAS.get(name))))
        install = ["uv", "pip", "install", "--quiet", "--python", str(python), "--constraint", str(folder / "held.txt")]
        upgrade = ["--upgrade-package", name] if newest else []
        _say(["uv", "venv", "--quiet", "--python", sys.executable, str(folder / "venv")])
        _say(
            [*install, *upgrade, f"{ROOT}[{extras}]", requirement], folder
        )  # not in ROOT: its uv settings force one torch
        asked = f"from importlib.metadata import version; print(version({name!r}))"
        version = _say([str(python), "-c", asked]).strip()
        if version in tried:
            return True, f"{version}: the same version"
        tried.add(version)
        told = _say([str(python), "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]).splitlines()
        return True, f"{version}: {next(line for line in reversed(told) if ' passed' in line).strip('= ')}"
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).splitlines()
        return False, next((line for line in said if line.startswith(("FAILED", "ERROR"))), "\n".join(said[-5:]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _say(command: list[str], folder: Path = ROOT) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"default: {', '.join(PACKAGES)}")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="what is run at each end")
    parser.add_argument("--list", action="store_true", help="only say what would be installed")
    chosen = parser.parse_args()
    if unknown := set(chosen.packages) - set(bounds()):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(bounds())}")
    broken = 0
    for name in chosen.packages or bounds():
        tried: set[str] = set()
        for newest, requirement in enumerate(ends(name)):
            if chosen.list:
                sys.stdout.write(f"{requirement}\n")
                continue
            passed, told = attempt(requirement, bool(newest), chosen.tests, tried)
            broken += not passed
            sys.stdout.write(f"{requirement}: {'passes' if passed else 'BREAKS'}: {told}\n")
            sys.stdout.flush()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
