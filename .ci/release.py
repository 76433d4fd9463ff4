"""How is a release made: built from a tag, checked, and with notes from the changelog?

    python .ci/release.py notes               # what is unreleased, as notes
    python .ci/release.py prepare 0.2.0       # changelog and citation get the version and the date; commit them, then tag v0.2.0
    python .ci/release.py build               # on the tag: wheel and sdist in dist/, checked, and dist/NOTES.md beside them

The version is the git tag's (pyproject.toml asks hatch-vcs); nothing is uploaded: the last line printed says how that is done.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ("recipes/demo.yaml", "data/datasets/demo_charts.yaml", "eval/tasks/chartqa.yaml")
"""One file of each kind that must travel in the wheel."""


def section(changelog: str, title: str) -> str:
    """The text under ``## title`` of the changelog. Raises `SystemExit` when there is none."""
    found = re.search(rf"^## {re.escape(title)}[^\n]*\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if found is None or not found[1].strip():
        sys.exit(f"CHANGELOG.md has nothing under '## {title}'")
    return found[1].strip() + "\n"


def prepare(root: Path, version: str, day: str) -> None:
    """Give what is unreleased the version and the day, in CHANGELOG.md and CITATION.cff."""
    if not re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", version):
        sys.exit(f"{version!r} is no version; expected 1.2.3, or 1.2.3rc1 before it")
    path = root / "CHANGELOG.md"
    text = path.read_text(encoding="utf-8")
    section(text, "Unreleased")
    if re.search(rf"^## {re.escape(version)}\b", text, re.M):
        sys.exit(f"CHANGELOG.md has a section {version} already")
    path.write_text(text.replace("## Unreleased\n", f"## Unreleased\n\n## {version} ({day})\n", 1), encoding="utf-8")
    citation = root / "CITATION.cff"
    cited = re.sub(r"^version: .*$", f"version: {version}", citation.read_text(encoding="utf-8"), flags=re.M)
    cited = re.sub(r"^date-released: .*\n", "", cited, flags=re.M)
    citation.write_text(cited.rstrip("\n") + f"\ndate-released: {day}\n", encoding="utf-8")


def build(root: Path, target: Path) -> tuple[Path, Path]:
    """(wheel, sdist) of what is committed, in ``target``. Raises `SystemExit` with what is wrong with them."""
    target.mkdir(parents=True, exist_ok=True)
    for old in [*target.glob("*.whl"), *target.glob("*.tar.gz")]:
        old.unlink()
    subprocess.run(["uv", "build", "--quiet", "--out-dir", str(target), str(root)], check=True)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    if problems := [*wheel_problems(wheel), *sdist_problems(sdist)]:
        sys.exit("\n".join(problems))
    return wheel, sdist


def wheel_problems(wheel: Path) -> list[str]:
    """What is missing from a wheel, or should not be in it."""
    names = zipfile.ZipFile(wheel).namelist()
    problems = [f"{wheel.name}: {path} is not in it" for path in ASSETS if f"mllm/_assets/{path}" not in names]
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        problems.append(f"{wheel.name}: the licence's text is not in it")
    stray = [name for name in names if not re.match(r"mllm/|mllm_toolkit-[^/]+\.dist-info/", name)]
    return [*problems, *(f"{wheel.name}: {name} does not belong in it" for name in stray[:5])]


def sdist_problems(sdist: Path) -> list[str]:
    """What is missing from a source distribution."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["LICENSE", "pyproject.toml", "README.md", "mllm/__init__.py", *ASSETS]
    return [f"{sdist.name}: {name} is not in it" for name in wanted if name not in names]


def version_of(wheel: Path) -> str:
    """The version in a wheel's name."""
    return wheel.name.split("-")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("notes", "prepare", "build"))
    parser.add_argument("version", nargs="?", help="of prepare")
    chosen = parser.parse_args()
    changelog = ROOT / "CHANGELOG.md"
    if chosen.step == "notes":
        print(section(changelog.read_text(encoding="utf-8"), "Unreleased"), end="")
    elif chosen.step == "prepare":
        prepare(ROOT, chosen.version or "", datetime.date.today().isoformat())
        print(
            f"next: git commit -am 'Release {chosen.version}' && git tag v{chosen.version} && python .ci/release.py build"
        )
    else:
        if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip():
            sys.exit("there are changes that are not committed; a release is built from a tag")
        wheel, sdist = build(ROOT, ROOT / "dist")
        version = version_of(wheel)
        if "dev" in version:
            sys.exit(f"{version}: this commit has no tag; git tag v1.2.3, then build again")
        notes = section(changelog.read_text(encoding="utf-8"), version)
        (ROOT / "dist/NOTES.md").write_text(notes, encoding="utf-8")
        print(f"{wheel.name}, {sdist.name} and NOTES.md are in dist/; uv publish uploads the first two")


if __name__ == "__main__":
    main()
