"""What does the HTML report look like: sentences, charts, and the samples with filters for wrong, unparsed and disputed answers?"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.errors import UnavailableError
from mllm.eval.report.results import MetricResult, TaskResult
from mllm.eval.report.samples import FILTERS, LISTED, Listing, disagreeing, embedded, linked, sample_html
from mllm.eval.studies.study import Study, number, spread, study_html
from mllm.svg_charts import Bar, interval_chart

__all__ = ["LISTED", "floor_note", "html_pages", "page_head"]
WHOLE = 2000
"""A report of at most so many samples is one file, pictures inside; of more it is a page for each task and filter."""
PER_PAGE = 200
_CATEGORIES = 24
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:76rem;padding:1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2.2rem}table{border-collapse:collapse;margin:.6rem 0}
th,td{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #e4e4e4;vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}
.note{color:#666;font-size:.88rem;margin:.15rem 0}.bar{position:sticky;top:0;background:#fff;padding:.6rem 0;z-index:1}
button{font:inherit;border:1px solid #bbb;background:#f7f7f7;border-radius:.3rem;padding:.15rem .7rem;
margin-right:.3rem}button.on{background:#1a1a1a;color:#fff}
.s{display:grid;grid-template-columns:15rem 1fr;gap:1rem;border-top:1px solid #ddd;padding:.8rem 0}
.s img{max-width:15rem;max-height:15rem;border:1px solid #ddd;display:block;margin-bottom:.3rem}
.s>div{min-width:0}.s,.note,td code{overflow-wrap:anywhere}
.q{font-weight:600;white-space:pre-wrap}.k{color:#777;display:inline-block;min-width:6.2rem}.p{white-space:pre-wrap}
.w{color:#b00020}.r{color:#0a7a2f}code{font-size:.85em}summary{cursor:pointer;margin:.6rem 0}a.f{cursor:pointer}
.chart{display:block;width:100%;max-width:40rem;height:auto}.pages a{margin-right:.5rem}
.none{color:#888;font-size:.85rem;border:1px dashed #ccc;padding:.6rem;width:8rem;text-align:center}
@media(max-width:76rem){table{display:block;overflow-x:auto}td:last-child{min-width:18rem}}
@media(max-width:46rem){.s{grid-template-columns:1fr}}
@media(prefers-color-scheme:dark){body,.bar{background:#151515;color:#eee}
th,td,.s{border-color:#333}button{background:#222;color:#eee;border-color:#555}button.on{background:#eee;color:#111}
.w{color:#ff8a8a}.r{color:#7ddc9a}.note,.k{color:#999}.s img{border-color:#444}}
"""
_SCRIPT = """
const on={};function f(t,k){on[t]=on[t]===k?'':k;
for(const x of document.querySelectorAll('#b-'+t+' button'))x.classList.toggle('on',x.dataset.k===on[t]);let n=0;
for(const s of document.querySelectorAll('.s[data-t="'+t+'"]')){const v=!on[t]||s.dataset.f.split(' ').includes(on[t]);
s.style.display=v?'':'none';n+=v}document.getElementById('n-'+t).textContent=n+' shown'}
"""


def html_pages(
    results: Mapping[str, TaskResult],
    listing: Callable[[str], Listing],
    thumbnails: Path,
    studies: Sequence[Study] = (),
) -> Iterator[tuple[str, str]]:
    """(file name, page) of the report, one after another; ``report.html`` comes last. listing: a task's samples, asked for one task
    at a time and then let go; thumbnails: folder of small pictures named by image hash, beside the report.

    With `WHOLE` samples or fewer in all there is one page that holds everything. With more, ``report.html`` has scores and charts,
    and the samples stand on pages of `PER_PAGE` for each task and filter, below ``report/``.
    """
    whole = sum(result.num_samples for result in results.values()) <= WHOLE
    parts = [*page_head("Evaluation"), _summary(results), _facts(results, studies), _contents(results, studies)]
    parts += [study_html(study) for study in studies]
    for name, result in results.items():
        listed = listing(name)
        parts += _task_head(name, result)
        if whole:
            parts += _all_samples(name, result, listed, thumbnails)
            continue
        pages = dict(_filter_pages(name, result, listed, thumbnails))
        parts += _doors(name, result, listed, pages)
        yield from pages.items()
    parts.append((f"<script>{_SCRIPT}</script>" if whole else "") + "</html>\n")
    yield "report.html", "\n".join(parts)


def page_head(title: str) -> list[str]:
    """The first lines of a page: title and style."""
    return [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}</style><h1>{_text(title)}</h1>",
    ]


def _summary(results: Mapping[str, TaskResult]) -> str:
    floors = {"blind": "blind", "shuffled": "shuffled", "prior": "prior"}
    floors = {word: way for word, way in floors.items() if any(getattr(r, way) is not None for r in results.values())}
    words, numbers = ("task", "metric"), ("score", "± SE", "95 %", *floors, "n", "unparsed")
    heading = "".join([*(f"<th>{h}" for h in words), *(f"<th class=n>{h}" for h in numbers)])
    lines = [f"<table><tr>{heading}</tr>"]
    for name, result in results.items():
        for position, metric in enumerate(own_metrics(result)):
            ways = [getattr(result, way) for way in floors.values()]
            index = result.metrics.index(metric)
            blind = "".join("<td class=n>" + ("–" if w is None else f"{w.metrics[index].value:.2f}") for w in ways)
            title = f'<a href="#{_anchor(name)}">{_text(name)}</a>' if position == 0 else ""
            lines.append(
                f"<tr><td>{title}<td>{_text(metric.label)}<td class=n>{metric.value:.2f} {_text(metric.unit)}"
                f"<td class=n>{metric.standard_error:.2f}<td class=n>{metric.low:.1f} – {metric.high:.1f}"
                f"{blind}<td class=n>{metric.num_scored}<td class=n>{metric.num_unparsed}</tr>"
            )
    return "".join(lines) + "</table>"


def own_metrics(result: TaskResult) -> list[MetricResult]:
    """The headline, and the metrics that differ from it on some sample or in the sum."""
    first, *others = result.metrics
    agree = {
        metric.label
        for metric in others
        if not result.disagreements.get(f"{first.label} | {metric.label}", 1)
        and (metric.value, metric.num_unparsed, metric.unit) == (first.value, first.num_unparsed, first.unit)
    }
    return [metric for metric in result.metrics if metric.label not in agree]


def facts_table(
    results: Mapping[str, TaskResult], studies: Sequence[Study]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headings, a row for each task) of what answering cost, how often it was declined, how sure the model was, and how much hangs on
    wording and pixels: columns that were measured for some task; no headings where none was."""
    columns: list[tuple[str, str, float, int]] = [
        ("new tokens", "tokens", 1, 1),
        ("prompt tokens", "prompt_tokens", 1, 0),
        ("ms an answer", "milliseconds", 1, 0),
        ("declined %", "refused", 100, 1),
        ("confidence %", "confidence", 100, 1),
        ("calibration error %", "calibration_error", 100, 1),
    ]
    facts = {name: result.facts for name, result in results.items()}
    columns = [column for column in columns if any(getattr(one, column[1]) is not None for one in facts.values())]
    flips = flips_of(studies)
    ways = list(dict.fromkeys(way for name in results for way in flips.get(name, {})))
    if not columns and not ways:
        return (), []
    rows = []
    for name, one in facts.items():
        values = ((getattr(one, key), scale, digits) for _, key, scale, digits in columns)
        cells = ["–" if value is None else number(scale * value, digits) for value, scale, digits in values]
        rows.append((name, *cells, *(number(flips.get(name, {}).get(way, float("nan")), 1) for way in ways)))
    return ("task", *(title for title, *_ in columns), *(f"flips by {way} %" for way in ways)), rows


def _facts(results: Mapping[str, TaskResult], studies: Sequence[Study]) -> str:
    headings, rows = facts_table(results, studies)
    if not headings:
        return ""
    note = (
        "<p class=note>Confidence is the mean probability that the model gave its answers; the calibration error (ECE, ten parts) is how "
        "far that is from being right, 0 where a model is right as often as it is sure.</p>"
    )
    return _table(headings, rows, 1) + (note if "confidence %" in headings else "")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """Of which the first ``words`` columns are text and the others numbers."""
    kinds = ["" if k < words else " class=n" for k in range(len(headings))]
    head = "".join(f"<th{kind}>{_text(title)}" for kind, title in zip(kinds, headings))
    body = ("".join(f"<td{kind}>{_text(cell)}" for kind, cell in zip(kinds, row)) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"


def flips_of(studies: Sequence[Study]) -> dict[str, dict[str, float]]:
    """Task → way of asking → percent of verdicts that flip, where the run's sensitivity was measured."""
    found: dict[str, dict[str, list[float]]] = {}
    for study in studies:
        for entry in study.data.get("variations", ()) if study.name == "sensitivity" else ():
            found.setdefault(entry["task"], {}).setdefault(entry["way"], []).append(100 * (entry["flips"] or 0.0))
    return {task: {way: sum(each) / len(each) for way, each in ways.items()} for task, ways in found.items()}


def difficulty_rows(result: TaskResult) -> list[tuple[str, ...]]:
    """The headline by difficulty, row by row under `DIFFICULTY_HEADINGS`."""
    return [
        (one.by, one.name, number(one.value), spread(one.low, one.high, digits=1), f"{one.num_samples:,}")
        for one in result.difficulty
    ]


DIFFICULTY_HEADINGS = ("difficulty by", "level", "score", "95 %", "n")


def _difficulty(result: TaskResult) -> str:
    return _table(DIFFICULTY_HEADINGS, difficulty_rows(result), 2) if result.difficulty else ""


FRAMES_SHOWN = {
    "frames_frozen": "the middle frame in every place of a video",
    "frames_shuffled": "a video's frames shuffled",
    "frames_reversed": "a video's frames backwards",
}


def floor_note(result: TaskResult) -> list[str]:
    """What seeing adds: the score against the best that needs no look at the right picture."""
    if result.blind is None and result.prior is None:
        return []
    best, way = result.floor
    scale, unit = result.metrics[0].scale, result.metrics[0].unit
    named = {"blank": result.blind, "shuffled": result.shuffled, "prior": result.prior}
    each = ", ".join(f"{name} {scale * one.score:.2f}" for name, one in named.items() if one is not None)
    counted = result.prior.header.get("counted_in") if result.prior is not None else None
    return [
        f"{scale * result.score:.2f} {unit} against {scale * best:.2f} without the right picture ({way}, the highest of {each})"
        + (f"; prior: the commonest answer of the question's kind, counted in {counted}" if counted else "")
    ] + [
        f"{scale * result.score:.2f} {unit} against {scale * one.score:.2f} with {FRAMES_SHOWN.get(way, way)}"
        for way, one in result.frames.items()
    ]


def sentence(result: TaskResult) -> str:
    """A task's result as a person would say it."""
    metric = result.metrics[0]
    unit = f" {metric.unit}" if metric.unit else ""
    sure = f", 95 % interval {metric.low:.1f} to {metric.high:.1f}" if metric.low == metric.low else ""
    text = (
        f"The score is {metric.value:.1f}{unit} over {metric.num_scored:,} samples{sure}, by the rule {metric.label}."
    )
    if metric.num_unparsed:
        text += f" {metric.num_unparsed:,} answers could not be read as any answer and count as wrong."
    if others := [m.label for m in result.metrics if m not in own_metrics(result)]:
        text += f" {' and '.join(others)} {'agrees' if len(others) == 1 else 'agree'} on every sample."
    return text


def limited_note(result: TaskResult) -> list[str]:
    """That fewer samples were asked than the benchmark has, whether by a limit or since its file holds fewer than were published."""
    if not result.header.get("limited"):
        return []
    published = result.header.get("task", {}).get("size")
    return [f"{result.num_samples} samples{f' of {published}' if published else ''}: not a benchmark score"]


def _contents(results: Mapping[str, TaskResult], studies: Sequence[Study]) -> str:
    places = [(f"study-{study.name}", study.title) for study in studies] + [(_anchor(name), name) for name in results]
    return "<p class=note>" + " · ".join(f'<a href="#{place}">{_text(title)}</a>' for place, title in places) + "</p>"


def _task_head(name: str, result: TaskResult) -> list[str]:
    notes = [*limited_note(result), *floor_note(result), *result.problems]
    notes += [f"{metric.label}: {metric.protocol}" for metric in own_metrics(result)]
    notes.append(result.protocol)
    if text := result.header.get("task", {}).get("note"):
        notes.append(text)
    lines = [f'<h2 id="{_anchor(name)}">{_text(name)}</h2>', f"<p>{_text(sentence(result))}</p>"]
    return [*lines, *(f"<p class=note>{_text(note)}</p>" for note in notes), _chart(name, result), _difficulty(result)]


def _chart(name: str, result: TaskResult) -> str:
    """The headline by category, with intervals; nothing where the task has no categories."""
    if not result.categories:
        return ""
    shown = sorted(result.categories[:_CATEGORIES], key=lambda one: -one.value)
    metric = result.metrics[0]
    bars = [Bar(one.name, one.value, one.low, one.high, one.num_samples) for one in shown]
    try:
        chart = interval_chart(bars, whole=metric.value, unit=metric.unit, label=f"{name}: {metric.label} by category")
    except UnavailableError as error:
        return f"<p class=note>{_text(error)}</p>"
    left = len(result.categories) - len(shown)
    return chart + (
        f"<p class=note>The {len(shown)} largest categories; {left} more are in results.json.</p>" if left else ""
    )


def _all_samples(name: str, result: TaskResult, listed: Listing, thumbnails: Path) -> list[str]:
    """Every sample under its buttons, for the report that is one file."""
    anchor, labels = _anchor(name), [metric.label for metric in result.metrics]
    buttons = "".join(
        f"<button data-k={key} onclick=\"f('{anchor}','{key}')\">{word} ({listed.counts[key]})</button>"
        for key, word in FILTERS.items()
    )
    lines = []
    for position, pair in enumerate(disagreeing(result)):
        text = f"{pair.replace(' | ', ' and ')} disagree on {result.disagreements[pair]} samples"
        link = f"""<a class=f href="#{anchor}" onclick="f('{anchor}','d{position}')">{_text(text)}</a>"""
        lines.append(f"<p class=note>{link}</p>")
    shown = f"{len(listed.rows)} shown"
    lines.append(f'<div class=bar id="b-{anchor}">{buttons}<span class=note id="n-{anchor}">{shown}</span></div>')
    show = embedded(thumbnails)
    return lines + [
        sample_html(anchor, row, flags, labels, listed.blind.get(row["id"]), show) for row, flags in listed.rows
    ]


def _filter_pages(name: str, result: TaskResult, listed: Listing, thumbnails: Path) -> Iterator[tuple[str, str]]:
    """(file name, page) of the samples under each filter."""
    labels, show = [metric.label for metric in result.metrics], linked(thumbnails, f"../{thumbnails.name}")
    for key, word in FILTERS.items():
        rows = listed.under(key)[:LISTED]
        count = -(-len(rows) // PER_PAGE)
        for place in range(count):
            part = rows[place * PER_PAGE : (place + 1) * PER_PAGE]
            others = [(k + 1, _page_name(name, key, k).partition("/")[2]) for k in range(count)]
            doors = "".join(f'<a href="{_text(file)}">{k}</a>' for k, file in others if k != place + 1)
            text = (
                f"{listed.counts[key]:,} samples, {place * PER_PAGE + 1} to {place * PER_PAGE + len(part)} on this page"
            )
            if listed.counts[key] > len(rows):
                text += f"; {len(rows):,} are listed, all are in {Path(result.path).name}"
            lines = [*page_head(f"{name}: {word}"), f"<p class=note>{_text(text)}</p>"]
            lines.append(f'<p class=pages><a href="../report.html#{_anchor(name)}">report</a>{doors}</p>')
            blind = (listed.blind.get(row["id"]) for row, _ in part)
            lines += [sample_html("", row, flags, labels, other, show) for (row, flags), other in zip(part, blind)]
            yield _page_name(name, key, place), "\n".join([*lines, "</html>\n"])


def _doors(name: str, result: TaskResult, listed: Listing, pages: Mapping[str, str]) -> list[str]:
    """Links to the pages of a task's samples."""
    lines = []
    for key, word in FILTERS.items():
        there = [page for page in (_page_name(name, key, k) for k in range(LISTED // PER_PAGE)) if page in pages]
        if there:
            links = "".join(f'<a href="{_text(page)}">{k}</a>' for k, page in enumerate(there, 1))
            lines.append(f"<p class=pages>{word} ({listed.counts[key]:,}): {links}</p>")
    return [
        *(f"<p class=note>{_text(pair.replace(' | ', ' and '))} disagree on {result.disagreements[pair]} samples</p>"
          for pair in disagreeing(result)),
        *lines,
    ]  # fmt: skip


def _page_name(task: str, key: str, number: int) -> str:
    return f"report/{_anchor(task)}.{key}.{number + 1:03d}.html"


def _anchor(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _text(value: Any) -> str:
    return html.escape(str(value))
