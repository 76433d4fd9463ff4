"""Is this the same benchmark that others were asked? A manifest says how charts are built again and what must come out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from mllm import assets
from mllm.config import StrictModel, read_yaml, validate
from mllm.data.charts.build import VERSION, ChartSettings, build_charts
from mllm.errors import ConfigError, DataError

PACKAGE = "package:"
QUESTIONS = "test.jsonl"


class FrozenCharts(StrictModel):
    """What is built, with which packages, and what comes out."""

    description: str
    version: int
    """`mllm.data.charts.build.VERSION` when it was frozen."""
    settings: dict[str, Any]
    """`ChartSettings`."""
    packages: dict[str, str] = Field(default_factory=dict)
    """Package of tables → its version."""
    num_questions: int
    questions: dict[str, str]
    """Renderer → sha256 of its rows of ``test.jsonl``: ids, questions, answers, tables."""
    pictures: dict[str, str]
    """Renderer → sha256 over its pictures' hashes, in the order of their names. Another version of a renderer draws other pixels of the
    same chart."""
    drawn_with: dict[str, str] = Field(default_factory=dict)
    """Renderer → its version when it was frozen."""

    def chart_settings(self) -> ChartSettings:
        """The settings to build with. Raises `ConfigError` for one that is not known."""
        known = {field.name for field in fields(ChartSettings)}
        if unknown := sorted(set(self.settings) - known):
            raise ConfigError(f"settings.{unknown[0]}: not a setting of charts; known are {', '.join(sorted(known))}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.settings.items()}
        return ChartSettings(**given)


def load_frozen(name: str) -> FrozenCharts:
    """A frozen benchmark by name (data/frozen) or path. Raises `ConfigError`, also for one of another version of the builder."""
    path = assets.find("data/frozen", name, kind="frozen benchmark")
    found = validate(FrozenCharts, read_yaml(path), where=path.name)
    if found.version != VERSION:
        raise ConfigError(
            f"{path.name}: frozen by version {found.version} of the builder, this is {VERSION}; the same settings draw other charts"
        )
    return found


def rebuild(
    name: str,
    output: Path,
    *,
    renderers: tuple[str, ...] | None = None,
    cache: Path | None = None,
    processes: int = 1,
    force: bool = False,
) -> tuple[FrozenCharts, list[str]]:
    """Build a frozen benchmark's test charts again: the manifest, and a line for every renderer whose pictures differ.

    renderers: only these; the questions then are the frozen ones' of these. Raises what `build_charts` does, `ConfigError` for a
    renderer that is not in it, and `DataError` where tables' package or the questions are others.
    """
    frozen = load_frozen(name)
    check_packages(frozen)
    settings = frozen.chart_settings()
    if unknown := sorted(set(renderers or ()) - set(settings.test_renderers)):
        raise ConfigError(f"--renderers {unknown[0]}: {name} is drawn by {', '.join(settings.test_renderers)}")
    if renderers is not None:
        settings = replace(settings, test_renderers=tuple(r for r in settings.test_renderers if r in renderers))
    build_charts(settings, output, cache=cache, processes=processes, force=force)
    return frozen, compare(frozen, output, settings.test_renderers)


def check_packages(frozen: FrozenCharts) -> None:
    """Raises `DataError` where a package of tables is of another version: its tables may differ."""
    for package, wanted in frozen.packages.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # the builder says how to install it
        if found != wanted:
            raise DataError(
                f"{package} is {found}, the benchmark was frozen with {wanted}: pip install {package}=={wanted}"
            )


def compare(frozen: FrozenCharts, folder: Path, renderers: Sequence[str] | None = None) -> list[str]:
    """What differs in the pictures that were built, a line for each renderer (default: of all). Raises `DataError` where the questions
    differ: scores on them are of another benchmark."""
    found, lines = describe(folder), []
    for renderer in renderers or frozen.questions:
        mine = found["questions"].get(renderer)
        if mine != frozen.questions[renderer]:
            raise DataError(
                f"{folder / QUESTIONS}: {renderer} has {'no questions' if mine is None else 'other questions than the frozen ones'} "
                f"(sha256 {str(mine)[:12]}…, expected {frozen.questions[renderer][:12]}…); tables, their package or pandas differ"
            )
        if found["pictures"].get(renderer) != frozen.pictures[renderer]:
            own, theirs = (
                drawn.get(renderer, "of unknown version") for drawn in (found["drawn_with"], frozen.drawn_with)
            )
            lines.append(f"{renderer}: the same charts in other pixels ({own} here, frozen with {theirs})")
    return lines


def freeze(folder: Path, path: Path, *, description: str) -> FrozenCharts:
    """Write the manifest of a folder's test charts to ``path``, as YAML. Raises `DataError` for a folder that is none of charts, or without
    questions."""
    import yaml

    if not (folder / "manifest.json").is_file():
        raise DataError(
            f"{folder}: no such folder of charts; `mllm data build charts TABLES --output {folder}` writes one"
        )
    built = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = describe(folder)
    if not found["num_questions"]:
        raise DataError(f"{folder}: holds no questions to freeze (--test-charts is 0)")
    settings = built["settings"]
    packages = {
        source.removeprefix(PACKAGE): importlib.metadata.version(source.removeprefix(PACKAGE))
        for source in settings["sources"]
        if source.startswith(PACKAGE)
    }
    plain = asdict(ChartSettings(("",)))
    own = {name: value for name, value in settings.items() if json.loads(json.dumps(plain[name])) != value}
    frozen = FrozenCharts(description=description, version=built["version"], settings=own, packages=packages, **found)
    text = yaml.safe_dump(frozen.model_dump(), sort_keys=False, allow_unicode=True, width=140)
    path.write_text(text, encoding="utf-8")
    return frozen


def describe(folder: Path) -> dict[str, Any]:
    """What is compared, of a folder."""
    questions: dict[str, Any] = {}
    lines = (folder / QUESTIONS).read_bytes().splitlines(keepends=True)
    for line in lines:
        questions.setdefault(json.loads(line)["renderer"], hashlib.sha256()).update(line)
    pictures = {}
    for renderer in questions:
        digest = hashlib.sha256()
        for path in sorted((folder / "test" / renderer).glob("*.png")):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        pictures[renderer] = digest.hexdigest()
    return {
        "num_questions": len(lines),
        "questions": {renderer: digest.hexdigest() for renderer, digest in questions.items()},
        "pictures": pictures,
        "drawn_with": {renderer: version for renderer in questions if (version := _version(renderer))},
    }


def _version(renderer: str) -> str:
    """The renderer's own version here; empty where it cannot be told."""
    packages = {"matplotlib": "matplotlib", "altair": "vl-convert-python"}
    programs = {
        "ggplot2": ["Rscript", "-e", "cat(as.character(packageVersion('ggplot2')))"],
        "gnuplot": ["gnuplot", "--version"],
    }
    if renderer in packages:
        try:
            return importlib.metadata.version(packages[renderer])
        except importlib.metadata.PackageNotFoundError:
            return ""
    if renderer in programs and shutil.which(programs[renderer][0]):
        done = subprocess.run(programs[renderer], capture_output=True, text=True, check=False)
        return done.stdout.strip().removeprefix("gnuplot ")
    return ""
