"""What did the demo learn? One HTML page: scores beside what needs no picture, the loss, a right and a wrong answer."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.svg_charts import line_chart

_FEW = 256
"""Pixels of a side up to which a picture is enlarged."""
_STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}table{border-collapse:collapse}
th,td{padding:.3rem .9rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
figure{display:flex;gap:1.5rem;align-items:center;margin:1.5rem 0}figure img{width:24rem;border:1px solid #ccc}
figure img.few{width:16rem;image-rendering:pixelated}
.right{color:#0a7a2f}.wrong{color:#b00020}.t{color:#666;font-size:.9rem}svg{display:block;width:100%;max-width:40rem;height:auto}
@media(max-width:40rem){figure{display:block}th,td{padding:.3rem .35rem;font-size:.92rem}}
@media(prefers-color-scheme:dark){body{color:#eee;background:#151515}.right{color:#7ddc9a}.wrong{color:#ff8a8a}.t{color:#999}
th,td,figure img{border-color:#333}}"""


def demo_page(
    scores: Mapping[str, Mapping[str, float | None]],
    losses: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    links: Mapping[str, str],
) -> str:
    """The page. scores: task → percent by name, ``score`` first, None: not measured; losses: records with ``stage``, ``step`` and ``loss``;
    answers: ``image`` (a file), ``question``, ``answer``, ``target`` and whether it is ``right``; links: words → address.
    """
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>mllm demo</title>',
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style>',
        "<h1>What the demo model learned</h1>",
        _scores(scores),
        "<p>"
        + " · ".join(f'<a href="{html.escape(to)}">{html.escape(word)}</a>' for word, to in links.items())
        + "</p>",
        "<h2>Loss</h2>",
        loss_curve(losses),
        "<h2>Answers to held-out questions</h2>",
        *map(_answer, answers),
        "</html>\n",
    ]
    return "\n".join(parts)


def _scores(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    names = list(next(iter(scores.values())))
    lines = ["<table><tr><th>held out" + "".join(f"<th>{html.escape(name)}" for name in names) + "</tr>"]
    for task, values in scores.items():
        cells = ("not measured" if values[name] is None else f"{values[name]:.1f} %" for name in names)
        lines.append(f"<tr><td>{html.escape(task)}" + "".join(f"<td>{value}" for value in cells) + "</tr>")
    lines.append(
        "</table><p class=t>blank: every picture gray; shuffled: another question's picture; prior: always the commonest answer of the "
        "question's kind. What seeing adds is the score above the highest of the three.</p>"
    )
    return "".join(lines)


def loss_curve(records: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the training loss, one line for each stage, the stages one after another."""
    points = [(str(row.get("stage", "")), float(row["loss"])) for row in records if row.get("loss") is not None]
    if len(points) < 2:
        return "<p class=t>no loss was recorded</p>"
    lines: dict[str, list[tuple[float, float]]] = {}
    for place, (stage, loss) in enumerate(points):
        lines.setdefault(stage, []).append((place, loss))
    return line_chart(lines, across="records of the log, stage after stage", label="training loss")


def _answer(row: Mapping[str, Any]) -> str:
    path = Path(row["image"])
    picture = (
        f"data:image/{'jpeg' if path.suffix == '.jpg' else 'png'};base64,{base64.b64encode(path.read_bytes()).decode()}"
    )
    with Image.open(path) as opened:  # of few pixels, each is shown; letters in a larger one would be torn by that
        few = " class=few" if max(opened.size) <= _FEW else ""
    word = "right" if row["right"] else "wrong"
    mark = "✓" if row["right"] else "✗"
    return (
        f'<figure><img{few} src="{picture}" alt=""><figcaption><p><b>{html.escape(row["question"])}</b></p>'
        f"<p class={word}>{mark} {html.escape(row['answer']) or 'no words'} <span class=t>({word})</span></p>"
        f"<p class=t>target: {html.escape(str(row['target']))}</p></figcaption></figure>"
    )
