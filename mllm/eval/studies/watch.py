"""How does a run's score grow: each checkpoint evaluated as it appears?"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.damage import damage_in
from mllm.errors import ConfigError, MllmError
from mllm.eval.generators.base import checkpoint_hash
from mllm.eval.predictions import write_atomic
from mllm.eval.report.exports import read_results
from mllm.eval.studies.study import Study, Table, number, save_study, spread, study_html

FOLDER = "watch"
_DEPTH = 2


@dataclass(frozen=True)
class Seen:
    """A checkpoint folder in a run. size: bytes and newest time of its files, by which it is known to be written to the end."""

    name: str
    path: Path
    size: tuple[int, int]


def checkpoints_in(run: str | Path) -> list[Seen]:
    """Folders of a run that hold a whole model (``config.json`` and safetensors, whatever wrote them), oldest first. Half-written
    ones (a ``.part`` file, a missing shard) are left out until they are whole. Raises `ConfigError` when the run does not exist."""
    place = Path(run)
    if not place.is_dir():
        raise ConfigError(f"{place}: no such folder; expected a run, such as runs/my")
    found = []
    for path in [place, *(p for depth in range(1, _DEPTH + 1) for p in place.glob("/".join("*" * depth)))]:
        if path.name == FOLDER or not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            continue
        files = [file for file in path.iterdir() if file.is_file()]
        if any(file.name.endswith(".part") for file in files) or damage_in(path):
            continue
        size = sum(file.stat().st_size for file in files), max(file.stat().st_mtime_ns for file in files)
        found.append(Seen(str(path.relative_to(place)) if path != place else place.name, path, size))
    return sorted(found, key=lambda seen: (seen.size[1], seen.name))


def watch(
    run: str | Path,
    evaluate: Callable[[Path, Path], Any],
    *,
    output: str | Path | None = None,
    interval: float = 30.0,
    once: bool = False,
    patience: float = 24 * 3600,
    until: str = "final",
    say: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Study:
    """Evaluate each checkpoint of a run as it appears: ``evaluate(checkpoint, folder)`` writes ``results.json`` into ``folder``.

    A checkpoint is taken when two looks see it unchanged (with ``once``, as it is); weights that were evaluated under another
    name (``final`` is the last stage) are not evaluated again. What was evaluated before is kept. One that cannot be
    evaluated is named and passed over. Ends when the checkpoint ``until`` has been evaluated, after ``patience`` seconds without a new
    one, or with ``once`` when none is left. The curve is written after each.
    """
    place = Path(output) if output is not None else Path(run) / "eval" / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    known, failed, last = _known(place), set(), {}
    quiet = 0.0
    while True:
        fresh = [
            seen for seen in checkpoints_in(run) if (seen.name, seen.size) not in failed and not _same(known, seen)
        ]
        ready = [seen for seen in fresh if once or last.get(seen.name) == seen.size]
        last = {seen.name: seen.size for seen in fresh}
        for seen in ready:
            quiet = 0.0
            digest = checkpoint_hash(str(seen.path))
            twin = next((name for name, entry in known.items() if entry["hash"] == digest), None)
            entry = {
                "hash": digest,
                "size": list(seen.size),
                "folder": known[twin]["folder"] if twin else seen.name.replace("/", "~"),
            }
            if twin is None:
                say(f"evaluating {seen.name}")
                try:
                    evaluate(seen.path, place / entry["folder"])
                except MllmError as error:
                    say(f"{seen.name}: not evaluated ({error})")
                    failed.add((seen.name, seen.size))
                    continue
            known[seen.name] = entry | ({"same_as": twin} if twin else {})
            write_atomic(place / "watch.json", json.dumps(known, indent=2) + "\n")
            curve(place, known)
        if until in known or once:
            break
        if quiet >= patience:
            say(f"no new checkpoint for {patience / 3600:g} h")
            break
        sleep(interval)
        quiet += interval
    if not known:
        raise ConfigError(f"{run}: no checkpoint to evaluate (a folder with config.json and safetensors); those of a stage under way hold "
                          "its state for going on, not a model")  # fmt: skip
    return curve(place, known)


def curve(place: Path, known: Mapping[str, Mapping[str, Any]]) -> Study:
    """Scores by checkpoint in the order they were written, with the change from the one before; ``curve.html`` draws them."""
    rows, points = [], {}
    before: dict[str, float] = {}
    for name, entry in known.items():
        if "same_as" in entry:
            continue
        for task, result in read_results(place / entry["folder"])["tasks"].items():
            metric = result["metrics"][0]
            value = float("nan") if metric["value"] is None else metric["value"]
            low, high = (float("nan") if metric[key] is None else metric[key] for key in ("low", "high"))
            change = f"{value - before[task]:+.2f}" if task in before else "–"
            before[task] = value
            rows.append((name, task, number(value), spread(low, high), change, str(metric["num_scored"])))
            points.setdefault(task, []).append((name, value, low, high))
    same = [f"{name} is {entry['same_as']}" for name, entry in known.items() if "same_as" in entry]
    tables = [Table("Scores by checkpoint", ("checkpoint", "task", "score", "95 %", "change", "n"), rows, 2)]
    study = Study("curve", "Learning curve", same, tables, {"points": points})
    save_study(study, place)
    pictures = "".join(f"<h3>{html.escape(task)}</h3>{_drawn(found)}" for task, found in points.items())
    style = "body{font:15px system-ui;margin:2em;color-scheme:light dark}svg{max-width:100%}td,th{padding:.2em .6em;text-align:left}"
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Learning curve</title><style>{style}</style>"
    write_atomic(place / "curve.html", f"{page}{study_html(study)}{pictures}</html>\n")
    return study


def _drawn(points: Sequence[tuple[str, float, float, float]]) -> str:
    """A line with its 95 % intervals, as SVG."""
    kept = [
        (name, value, low if low == low else value, high if high == high else value)
        for name, value, low, high in points
        if value == value
    ]
    if not kept:
        return ""
    bottom, top = min(low for *_, low, _ in kept), max(high for *_, high in kept)
    width, height, span = 640, 220, (top - bottom) or 1.0

    def x(place: int) -> float:
        return 50 + place * (width - 80) / max(1, len(kept) - 1)

    def y(value: float) -> float:
        return 20 + (height - 60) * (1 - (value - bottom) / span)

    line = " ".join(f"{x(k):.1f},{y(value):.1f}" for k, (_, value, _, _) in enumerate(kept))
    marks = "".join(
        f"<line x1={x(k):.1f} x2={x(k):.1f} y1={y(low):.1f} y2={y(high):.1f} stroke=currentColor opacity=.4 />"
        f"<circle cx={x(k):.1f} cy={y(value):.1f} r=3 fill=currentColor><title>{html.escape(name)}: {value:.2f}</title></circle>"
        f"<text x={x(k):.1f} y={height - 8} font-size=11 text-anchor=middle fill=currentColor>{html.escape(name)}</text>"
        for k, (name, value, low, high) in enumerate(kept)
    )
    scale = "".join(f"<text x=2 y={y(v) + 4:.1f} font-size=11 fill=currentColor>{v:.1f}</text>" for v in (bottom, top))
    drawn = f"<polyline points='{line}' fill=none stroke=currentColor />"
    return f"<svg viewBox='0 0 {width} {height}' width={width} role=img>{scale}{drawn}{marks}</svg>"


def _known(place: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((place / "watch.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ConfigError(
            f"{place / 'watch.json'}: cannot be read ({error}); remove it to evaluate everything again"
        ) from None


def _same(known: Mapping[str, Mapping[str, Any]], seen: Seen) -> bool:
    return seen.name in known and tuple(known[seen.name]["size"]) == seen.size
