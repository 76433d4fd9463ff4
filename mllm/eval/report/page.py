"""What does the HTML report look like: one file, pictures inside, filters for wrong, unparsed and disputed answers?"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.eval.report.results import Row, TaskResult, disagree
from mllm.eval.studies.study import Study, study_html

LISTED = 2000
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


def html_page(
    results: Mapping[str, TaskResult],
    rows: Mapping[str, Sequence[Row]],
    blind: Mapping[str, Mapping[str, Row]],
    thumbnails: Path,
    studies: Sequence[Study] = (),
) -> str:
    """The report. rows: predictions by task; blind: blind predictions by task and id; thumbnails: folder of small
    pictures named by image hash. At most 2000 samples per task are listed, those with something to look at first."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}</style><h1>Evaluation</h1>",
        _summary(results),
        _contents(results, studies),
        *(study_html(study) for study in studies),
    ]
    for name, result in results.items():
        parts.append(_task(name, result, rows[name], blind.get(name, {}), thumbnails))
    parts.append(f"<script>{_SCRIPT}</script></html>\n")
    return "\n".join(parts)


def _summary(results: Mapping[str, TaskResult]) -> str:
    words, numbers = ("task", "metric"), ("score", "± SE", "95 %", "blind", "shuffled", "prior", "n", "unparsed")
    heading = "".join([*(f"<th>{h}" for h in words), *(f"<th class=n>{h}" for h in numbers), "<th>rule"])
    lines = [f"<table><tr>{heading}</tr>"]
    for name, result in results.items():
        for position, metric in enumerate(result.metrics):
            floors = (result.blind, result.shuffled, result.prior)
            blind = "<td class=n>".join("–" if one is None else f"{one.metrics[position].value:.2f}" for one in floors)
            title = f'<a href="#{_anchor(name)}">{_text(name)}</a>' if position == 0 else ""
            lines.append(
                f"<tr><td>{title}<td>{_text(metric.label)}<td class=n>{metric.value:.2f} {_text(metric.unit)}"
                f"<td class=n>{metric.standard_error:.2f}<td class=n>{metric.low:.1f} – {metric.high:.1f}"
                f"<td class=n>{blind}<td class=n>{metric.num_scored}<td class=n>{metric.num_unparsed}"
                f"<td>{_text(metric.protocol)}</tr>"
            )
    return "".join(lines) + "</table>"


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


def _contents(results: Mapping[str, TaskResult], studies: Sequence[Study]) -> str:
    places = [(f"study-{study.name}", study.title) for study in studies] + [(_anchor(name), name) for name in results]
    return "<p class=note>" + " · ".join(f'<a href="#{place}">{_text(title)}</a>' for place, title in places) + "</p>"


def _task(name: str, result: TaskResult, rows: Sequence[Row], blind: Mapping[str, Row], thumbnails: Path) -> str:
    labels = [metric.label for metric in result.metrics]
    pairs = [pair for pair, count in result.disagreements.items() if count]
    tagged = [(row, _flags(row, labels, pairs)) for row in rows]
    shown = sorted(tagged, key=lambda pair: not pair[1])[:LISTED] if len(tagged) > LISTED else tagged
    counts = {key: sum(key in flags for _, flags in tagged) for key in ("wrong", "unparsed", "disagree", "error")}
    anchor = _anchor(name)
    buttons = "".join(
        f"<button data-k={key} onclick=\"f('{anchor}','{key}')\">{word} ({counts[key]})</button>"
        for key, word in (
            ("wrong", "wrong"),
            ("unparsed", "unparsed"),
            ("disagree", "metrics disagree"),
            ("error", "failed"),
        )
    )
    notes = [result.protocol, *floor_note(result), *result.problems]
    if text := result.header.get("task", {}).get("note"):
        notes.append(text)
    if len(shown) < len(tagged):
        notes.append(f"{len(shown)} of {len(tagged)} samples are listed here; all are in {Path(result.path).name}")
    lines = [f'<h2 id="{anchor}">{_text(name)}</h2>', *(f"<p class=note>{_text(note)}</p>" for note in notes)]
    for position, pair in enumerate(pairs):
        told = f"{pair.replace(' | ', ' and ')} disagree on {result.disagreements[pair]} samples"
        link = f"""<a class=f href="#{anchor}" onclick="f('{anchor}','d{position}')">{_text(told)}</a>"""
        lines.append(f"<p class=note>{link}</p>")
    lines.append(
        f'<div class=bar id="b-{anchor}">{buttons}<span class=note id="n-{anchor}">{len(shown)} shown</span></div>'
    )
    lines += [_sample(anchor, row, flags, labels, blind.get(row["id"]), thumbnails) for row, flags in shown]
    return "\n".join(lines)


def _flags(row: Row, labels: Sequence[str], pairs: Sequence[str]) -> list[str]:
    """What a sample can be filtered by; ``d0``, ``d1`` …: the pairs of metrics that disagree on it."""
    scores = row.get("scores", {})
    headline = scores.get(labels[0])
    flags = []
    if headline is not None and "error" not in headline and (headline["value"] or 0) < 1:
        flags.append("wrong")
    if any(entry.get("value") is None and "error" not in entry for entry in scores.values()):
        flags.append("unparsed")
    if disagree(row, labels):
        flags.append("disagree")
        flags += [f"d{k}" for k, pair in enumerate(pairs) if disagree(row, pair.split(" | "))]
    if row.get("error") or row.get("unusable"):
        flags.append("error")
    return flags


def _sample(
    anchor: str, row: Row, flags: Sequence[str], labels: Sequence[str], blind: Row | None, thumbnails: Path
) -> str:
    pictures = "".join(_image(thumbnails / f"{digest[:24]}.jpg") for digest in row["images"][:4])
    if len(row["images"]) > 4:
        pictures += f"<div class=none>and {len(row['images']) - 4} more</div>"
    lines = [f"<div class=q>{_text(row['question'])}</div>"]
    target = row["target"] if row["target"] is not None else "(none)"
    lines.append(f"<div><span class=k>target</span> {_text(target)}</div>")
    said = row.get("error") or row.get("unusable") or _shown(row["output"])
    wrong = "w" if {"wrong", "error"} & set(flags) else "r"
    lines.append(f'<div><span class=k>answer</span> <span class="p {wrong}">{_text(said)}</span></div>')
    if blind is not None:
        lines.append(
            f"<div><span class=k>blind answer</span> <span class=p>{_text(_shown(blind['output']))}</span></div>"
        )
    for label in labels:
        entry = row.get("scores", {}).get(label)
        if entry is None:
            continue
        value = entry.get("error") or ("unparsed" if entry["value"] is None else f"{entry['value']:.3g}")
        detail = (
            ""
            if "error" in entry
            else f" · read as <code>{_text(entry['extracted']) or 'nothing'}</code> · {_text(entry['rule'])}"
        )
        lines.append(f"<div class=note>{_text(label)}: {_text(value)}{detail}</div>")
    category = f" · {row['category']}" if row.get("category") else ""
    lines.append(f"<div class=note>{_text(row['id'])}{_text(category)}</div>")
    body = f"<div>{pictures}</div><div>{''.join(lines)}</div>"
    return f'<div class=s data-t="{anchor}" data-f="{" ".join(flags)}">{body}</div>'


def _image(path: Path) -> str:
    if not path.is_file():
        return "<div class=none>no small copy kept</div>"
    return f'<img alt="" loading=lazy src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _shown(text: str) -> str:
    """A reply as it is, in quotes when white space at its ends would not be seen."""
    return text if text and text == text.strip() else f"“{text}”"


def _anchor(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _text(value: Any) -> str:
    return html.escape(str(value))
