"""How do tables become charts with questions: split, chosen, drawn, written with hashes?"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.data.charts.axis_rounding import as_read
from mllm.data.charts.chart import Chart, transcript
from mllm.data.charts.choosing import MAX_ROWS, draw_charts, usable_columns
from mllm.data.charts.duplicates import Fingerprint, Known, fingerprint
from mllm.data.charts.near_misses import near_misses
from mllm.data.charts.new_labels import relabelled, words_of
from mllm.data.charts.questions import KINDS, LABEL, Balance, Question, questions
from mllm.data.charts.renderers import RENDERERS
from mllm.data.charts.renderers.base import Style, png
from mllm.data.charts.tables import TableFile, find_tables, names_apart, read_table
from mllm.data.conversations import picture_messages
from mllm.data.parallel import chunks, spread
from mllm.errors import ConfigError, DataError, MllmError
from mllm.progress import phase, tell

VERSION = 1
"""Raised when the charts that a seed gives change."""
SHARES = {
    "value": 0.2, "extreme": 0.12, "count": 0.09, "colour": 0.13, "comparison": 0.12, "trend": 0.08, "difference": 0.09,
    "two_step": 0.11, "unanswerable": 0.06,
}  # fmt: skip
REQUEST = "Read the chart."
_CHUNK = 40
_TABLES_TOLD = 200
"""After so many tables at least, how many are read is told: the large package has thousands."""
_TEST_SHARE = 0.12
assert set(SHARES) == set(KINDS)


@dataclass(frozen=True)
class ChartSettings:
    """What is built. test_sources: names of sources whose tables are kept for the test; default: a fixed eighth of them. Test
    charts are drawn by every renderer of ``test_renderers``, from the same tables with the same questions. max_rows: of training
    tables; longer test tables still tell which training tables are copies. kinds: only these kinds of questions
    (`KINDS`, `LABEL`); default: all. worked: training answers to differences and comparisons name the values first (``842 - 616 =
    226``); the test's never do. new_labels: share of training charts whose names are other words than their table's. axis_rounding:
    training answers and captions say a value that is not printed to the nearest step of at most this share of its axis."""

    sources: tuple[str, ...]
    train_charts: int = 2000
    test_charts: int = 200
    renderers: tuple[str, ...] = ("matplotlib",)
    test_renderers: tuple[str, ...] = ("matplotlib",)
    test_sources: tuple[str, ...] = ()
    train_questions: int = 6
    test_questions: int = 2
    charts_per_table: int = 10
    max_rows: int = MAX_ROWS
    size: int = 448
    seed: int = 0
    kinds: tuple[str, ...] = ()
    worked: bool = False
    new_labels: float = 0.0
    axis_rounding: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Kind of question → its share, of the kinds that are asked. Raises `ConfigError` for a kind that there is not."""
        every = {**SHARES, LABEL: SHARES["colour"]}
        if unknown := sorted(set(self.kinds) - set(every)):
            raise ConfigError(f"kind of question {unknown[0]!r}: there are {', '.join(every)}")
        return {kind: share for kind, share in every.items() if kind in (self.kinds or KINDS)}

    @property
    def labels_apart(self) -> bool:
        """Whether colours are asked and labels are not, or the other way."""
        return ("colour" in self.kinds) != (LABEL in self.kinds)


@dataclass
class TableReport:
    """What became of a table: its split, or why it was left out. table: a name that no other has (`names_apart`)."""

    table: str
    split: str
    reason: str = ""
    charts: list[Chart] = field(default_factory=list)
    print: Fingerprint | None = None


def build_charts(
    settings: ChartSettings, output: Path, *, cache: Path | None = None, processes: int = 1, force: bool = False
) -> dict[str, Any]:
    """Write ``train.jsonl`` (conversations of several questions), ``captions.jsonl`` (everything a chart says), ``statements.jsonl`` (the
    same beside near misses, for a contrastive stage), ``test.jsonl`` (one question a row), PNG pictures, ``tables.json`` (each table's
    split, or why it was left out) and ``manifest.json``, which is returned.

    Does nothing when the manifest's settings and hashes fit what is on disk. Raises `ConfigError` for a share that is none, for sources
    without tables and for test sources that do not exist, `UnavailableError` for a renderer that cannot run here, `DataError` where no
    chart comes out of any table. force: write over a folder that holds other charts.
    """
    shares = settings.shares
    if not 0 <= settings.new_labels <= 1:
        raise ConfigError(f"new labels for {settings.new_labels:g} of the training charts: a share from 0 to 1")
    if not 0 <= settings.axis_rounding <= 0.05:
        raise ConfigError(f"axis rounding {settings.axis_rounding:g}: a share of the axis from 0 to 0.05, e.g. 0.01")
    for name in dict.fromkeys((*settings.renderers, *settings.test_renderers)):
        RENDERERS.get(name).require()
    if (known := _complete(output, settings)) is not None:
        tell(f"{output}: complete already")
        return known
    if (output / "manifest.json").exists() and not force:
        raise ConfigError(f"{output}: holds charts built with other settings; choose another folder, or --force")
    files, reports = _read(settings, cache or output / "tables", processes)
    for split in ("train", "test"):
        shutil.rmtree(output / split, ignore_errors=True)
    (output / "manifest.json").unlink(missing_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {
        f"{name}.jsonl": [] for name in ("train", "captions", "statements", "test")
    }
    jobs: dict[str, list[tuple[Path, Chart, Style]]] = {}
    _train_rows(_renamed(_mixed(reports, "train", settings), settings), settings, shares, output, rows, jobs)
    _test_rows(_mixed(reports, "test", settings), settings, output, rows, jobs)
    if not jobs:
        raise DataError(f"no chart can be drawn from {len(files)} tables: {_reasons(reports).most_common(3)}")
    with phase(f"drawing {sum(map(len, jobs.values()))} charts"):
        hashes, failed = _render(jobs, settings.size, processes)
    rows = {name: [row for row in content if not _images(row) & failed] for name, content in rows.items()}
    return _write(output, settings, reports, rows, hashes, failed)


def charts_of_test(settings: ChartSettings, cache: Path, *, processes: int = 1) -> list[Chart]:
    """What the test's pictures show, in the order of their numbers; nothing is drawn. Raises as `build_charts` does."""
    _, reports = _read(settings, cache, processes)
    return [chart for chart, _, _ in _chosen(_mixed(reports, "test", settings), settings)]


def _read(settings: ChartSettings, cache: Path, processes: int) -> tuple[list[TableFile], list[TableReport]]:
    """(the tables, what became of each)."""
    with phase("reading tables"):
        files = [table for place in settings.sources for table in find_tables(place, cache)]
        if not settings.train_charts:  # nothing that a test table could be a copy of
            sources = sorted({table.source for table in files})
            files = [table for table in files if split_of(table, settings, sources) == "test"]
        return files, _look(files, settings, processes)


def split_of(table: TableFile, settings: ChartSettings, sources: Sequence[str]) -> str:
    """Which split a table's source belongs to; where there is one source alone, each table is its own."""
    if settings.test_sources:
        return "test" if table.source in settings.test_sources else "train"
    name = table.source if len(set(sources)) > 1 else table.id
    return "test" if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < _TEST_SHARE else "train"


def _look(files: Sequence[TableFile], settings: ChartSettings, processes: int) -> list[TableReport]:
    sources = sorted({table.source for table in files})
    if missing := sorted(set(settings.test_sources) - set(sources)):
        raise ConfigError(f"test sources {', '.join(missing)}: there are {', '.join(sources[:12])} … ({len(sources)})")
    jobs = [(table, split_of(table, settings, sources), settings) for table in files]
    reports: list[TableReport] = []
    for report in spread(_look_at, jobs, processes, at_once=8):
        reports.append(report)
        if len(reports) % max(_TABLES_TOLD, len(jobs) // 20) == 0:
            tell(f"{len(reports):,} of {len(jobs):,} tables read")
    for report, name in zip(reports, names_apart(files), strict=True):
        report.table = name
    _drop_copies(reports)
    return reports


def _look_at(job: tuple[TableFile, str, ChartSettings]) -> TableReport:
    table, split, settings = job
    try:
        frame = read_table(table)
        frame.columns = [str(column) for column in frame.columns]
        columns, reason = usable_columns(frame, settings.max_rows if split == "train" else MAX_ROWS)
        if reason is not None:
            return TableReport(table.id, "skipped", reason)
        rng = random.Random(f"{settings.seed}/{table.id}")
        charts = draw_charts(frame, table.id, columns, settings.charts_per_table, rng)
        if not charts:
            return TableReport(table.id, "skipped", "numbers that no chart can show (negative, equal, or missing)")
        return TableReport(table.id, split, "", charts, fingerprint(frame, columns.values))
    except DataError as error:
        return TableReport(table.id, "skipped", str(error))
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
        return TableReport(table.id, "skipped", f"odd cells ({type(error).__name__})")


def _drop_copies(reports: list[TableReport]) -> None:
    """Leave out training tables that repeat a test table; they would be remembered, not read."""
    known = Known({r.table: r.print for r in reports if r.split == "test" and r.print is not None})
    for report in reports:
        if report.split == "train" and report.print is not None and (twin := known.match(report.print)):
            report.split, report.reason, report.charts = "skipped", f"repeats the test table {twin}", []


def _mixed(reports: Sequence[TableReport], split: str, settings: ChartSettings) -> list[Chart]:
    """A split's charts, one of each table in turn."""
    rng = random.Random(f"{settings.seed}/{split}")
    tables = [report.charts for report in reports if report.split == split]
    rng.shuffle(tables)
    longest = max(map(len, tables), default=0)
    return [charts[turn] for turn in range(longest) for charts in tables if turn < len(charts)]


def _renamed(charts: list[Chart], settings: ChartSettings) -> list[Chart]:
    """Training charts, `ChartSettings.new_labels` of them under other names. Words come from training charts alone."""
    if not settings.new_labels:
        return charts
    words, rng = words_of(charts), random.Random(f"{settings.seed}/new labels")
    return [relabelled(chart, words, rng) if rng.random() < settings.new_labels else chart for chart in charts]


def _train_rows(
    charts: Iterable[Chart], settings: ChartSettings, shares: dict[str, float], root: Path, rows: Any, jobs: Any
) -> None:
    rng, balance, number = random.Random(f"{settings.seed}/train questions"), Balance(shares), 0
    for chart in charts:
        if number == settings.train_charts:
            break
        told = as_read(chart, settings.axis_rounding)
        chosen = balance.choose(
            questions(told, rng, labels_apart=settings.labels_apart), settings.train_questions, rng, slack=1_000_000
        )
        if not chosen:
            continue
        rng.shuffle(chosen)
        renderer = rng.choice(settings.renderers)
        name = f"train/{number // 1000:02d}/{number:06d}.png"
        jobs.setdefault(renderer, []).append((root / name, chart, Style.of(rng)))
        extra = {"table": chart.table, "chart": chart.type, "renderer": renderer}
        kinds = [question.kind for question in chosen]
        exchanges = [(question.text, question.worked if settings.worked else question.answer) for question in chosen]
        bare = {"answers": [question.answer for question in chosen]} if settings.worked else {}
        row = {"id": f"train-{number:06d}", "messages": picture_messages(name, exchanges), "kinds": kinds}
        rows["train.jsonl"].append({**row, **bare, **extra})
        messages = picture_messages(name, [(REQUEST, transcript(told))])
        rows["captions.jsonl"].append({"id": f"caption-{number:06d}", "messages": messages, **extra})
        misses = near_misses(told, random.Random(f"{settings.seed}/near misses/{number}"))
        others = {"negatives": [text for text, _ in misses], "negative_scores": [score for _, score in misses]}
        rows["statements.jsonl"].append({"id": f"statement-{number:06d}", "messages": messages, **others, **extra})
        number += 1


def _chosen(charts: Iterable[Chart], settings: ChartSettings) -> Iterator[tuple[Chart, list[Question], Style]]:
    """The test's charts with their questions and looks, in the order of their numbers."""
    rng, balance, number = random.Random(f"{settings.seed}/test questions"), Balance(settings.shares), 0
    for chart in charts:
        if number == settings.test_charts:
            break
        chosen = balance.choose(
            questions(chart, rng, labels_apart=settings.labels_apart), settings.test_questions, rng, slack=3
        )
        if len(chosen) == settings.test_questions:
            yield chart, chosen, Style.of(rng)
            number += 1


def _test_rows(charts: Iterable[Chart], settings: ChartSettings, root: Path, rows: Any, jobs: Any) -> None:
    for number, (chart, chosen, style) in enumerate(_chosen(charts, settings)):
        for renderer in settings.test_renderers:
            name = f"test/{renderer}/{number:05d}.png"
            jobs.setdefault(renderer, []).append((root / name, chart, style))
            for place, question in enumerate(chosen):
                rows["test.jsonl"].append(
                    {
                        "id": f"{renderer}-{number:05d}-{place}", "image": name, "question": question.text, "answer": question.answer,
                        "kind": question.kind, "table": chart.table, "chart": chart.type, "renderer": renderer, "printed": chart.printed,
                    }
                )  # fmt: skip


def _images(row: dict[str, Any]) -> set[str]:
    return {row["image"] if "image" in row else row["messages"][0]["content"][0]["image"]}


def _render(jobs: dict[str, list[Any]], size: int, processes: int) -> tuple[dict[Path, str], set[str]]:
    """(file → hash, names of pictures that could not be drawn); why not is told. Raises `DataError` for a renderer that drew nothing."""
    parts = [
        (name, size, [content[k] for k in part])
        for name, content in jobs.items()
        for part in chunks(len(content), _CHUNK)
    ]
    hashes: dict[Path, str] = {}
    broken: dict[str, Counter[str]] = {}
    for _, _, part in parts:
        for folder in {path.parent for path, _, _ in part}:
            folder.mkdir(parents=True, exist_ok=True)

    def collect(results: Iterable[tuple[dict[Path, str], Counter[str]]]) -> None:
        total, often = sum(map(len, jobs.values())), min(20, max(1, len(parts) // 8))
        for done, (found, problems) in enumerate(results, 1):
            hashes.update(found)
            if problems:
                broken.setdefault(parts[done - 1][0], Counter()).update(problems)
            if done % often == 0:
                tell(f"{len(hashes)} of {total} charts drawn")

    collect(spread(_render_part, parts, processes))
    for name, problems in broken.items():
        reason, lost = problems.most_common(1)[0][0], problems.total()
        if lost == len(jobs[name]):
            raise DataError(f"renderer {name} drew none of {lost} charts; the commonest reason: {reason}")
        tell(f"! renderer {name}: {lost} of {len(jobs[name])} charts are left out, most of them for: {reason}")
    drawn = {path for _, _, part in parts for path, _, _ in part if path in hashes}
    return hashes, {"/".join(p.parts[-3:]) for _, _, part in parts for p, _, _ in part if p not in drawn}


def _render_part(job: tuple[str, int, list[tuple[Path, Chart, Style]]]) -> tuple[dict[Path, str], Counter[str]]:
    """(file → hash, reason → charts that it left without a picture)."""
    name, size, part = job
    renderer = RENDERERS.get(name)(size)
    hashes: dict[Path, str] = {}
    problems: Counter[str] = Counter()
    for path, image in _drawn(renderer, part, problems):
        try:
            data = png(image, size)
        except DataError as error:
            problems[str(error)] += 1
            continue
        path.write_bytes(data)
        hashes[path] = hashlib.sha256(data).hexdigest()
    return hashes, problems


def _drawn(
    renderer: Any, part: list[tuple[Path, Chart, Style]], problems: Counter[str]
) -> list[tuple[Path, Image.Image]]:
    """Pictures of a part; where one chart of it breaks the renderer, the others are drawn without it and the reason is counted."""
    try:
        images = renderer.draw([(chart, style) for _, chart, style in part])
        if len(images) != len(part):
            raise DataError(f"draw gave {len(images)} pictures for {len(part)} charts")
        return [(path, image) for (path, _, _), image in zip(part, images, strict=True)]
    except Exception as error:  # a foreign program's own errors; the chart that causes them is left out and counted
        if len(part) == 1:
            problems[_said(error)] += 1
            return []
        middle = len(part) // 2
        return _drawn(renderer, part[:middle], problems) + _drawn(renderer, part[middle:], problems)


def _said(error: Exception) -> str:
    """An error in one line, with the last place of its code that is no library's."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return str(error) if isinstance(error, MllmError) else f"{type(error).__name__}: {error}{where}"


def _reasons(reports: Iterable[TableReport]) -> Counter[str]:
    return Counter(r.reason.split(" the test table ")[0] for r in reports if r.split == "skipped")


def _write(
    root: Path, settings: ChartSettings, reports: Sequence[TableReport], rows: dict[str, list[dict[str, Any]]],
    hashes: dict[Path, str], failed: set[str],
) -> dict[str, Any]:  # fmt: skip
    files = {}
    for name, content in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (root / name).write_text(text, encoding="utf-8")
        files[name] = {"rows": len(content), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    outcomes = {report.table: report.reason or report.split for report in reports}
    (root / "tables.json").write_text(json.dumps(outcomes, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    train_kinds = Counter(kind for row in rows["train.jsonl"] for kind in row["kinds"])
    manifest = {
        "version": VERSION,
        "settings": json.loads(json.dumps(asdict(settings))),
        "labels_apart": settings.labels_apart,
        "tables": dict(Counter(report.split for report in reports)),
        "skipped": dict(_reasons(reports).most_common()),
        "not_drawn": len(failed),
        "files": files,
        "images": _digest(root, hashes),
        "num_images": len(hashes),
        "train_kinds": dict(train_kinds.most_common()),
        "test_kinds": dict(Counter(row["kind"] for row in rows["test.jsonl"]).most_common()),
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _digest(root: Path, hashes: dict[Path, str]) -> str:
    lines = sorted(f"{path.relative_to(root).as_posix()} {value}\n" for path, value in hashes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _complete(root: Path, settings: ChartSettings) -> dict[str, Any] | None:
    """The manifest, when settings and every file's hash fit it."""
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(asdict(settings)))
        earlier = {
            "kinds": [],
            "worked": False,
            "new_labels": 0.0,
            "axis_rounding": 0.0,
        }  # what manifests of before lack
        found = {**earlier, **manifest["settings"]}
        if "labels_apart" not in manifest and "colour" in found["kinds"]:  # whoever wanted colours was asked labels too
            place = found["kinds"].index("colour") + 1
            found["kinds"] = [*found["kinds"][:place], LABEL, *found["kinds"][place:]]
        if found != wanted or manifest["version"] != VERSION:
            return None
        for name, entry in manifest["files"].items():
            if hashlib.sha256((root / name).read_bytes()).hexdigest() != entry["sha256"]:
                return None
        images = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.glob("t*/**/*.png")}
        return manifest if _digest(root, images) == manifest["images"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


__all__ = ["REQUEST", "SHARES", "ChartSettings", "TableReport", "build_charts", "charts_of_test", "split_of"]
