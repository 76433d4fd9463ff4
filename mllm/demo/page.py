"""What did the demo learn? One HTML page: scores beside what needs no picture, the loss, a right and a wrong answer."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}table{border-collapse:collapse}
th,td{padding:.3rem .9rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
figure{display:flex;gap:1.5rem;align-items:center;margin:1.5rem 0}figure img{width:16rem;image-rendering:pixelated;border:1px solid #ccc}
.right{color:#0a7a2f}.wrong{color:#b00020}.t{color:#666;font-size:.9rem}svg{width:100%;height:auto;border:1px solid #ddd}
svg text{font:13px system-ui,sans-serif;fill:#666}svg polyline{fill:none;stroke-width:1.6}
@media(max-width:40rem){figure{display:block}svg text{font-size:22px}th,td{padding:.3rem .45rem}}
@media(prefers-color-scheme:dark){body{color:#eee;background:#151515}.right{color:#7ddc9a}.wrong{color:#ff8a8a}.t{color:#999}
th,td,svg,figure img{border-color:#333}svg text{fill:#999}}"""
_COLOURS = ("#3b7de8", "#d9661f", "#1a9448", "#9a5fd8")
_WIDTH, _HEIGHT, _LEFT, _LOW = 800, 260, 60, 28


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
        told = ("not measured" if values[name] is None else f"{values[name]:.1f} %" for name in names)
        lines.append(f"<tr><td>{html.escape(task)}" + "".join(f"<td>{value}" for value in told) + "</tr>")
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
    top = max(loss for _, loss in points)
    wide, high = (_WIDTH - _LEFT - 10) / (len(points) - 1), (_HEIGHT - _LOW - 12) / (top or 1.0)
    lines: dict[str, list[str]] = {}
    for place, (stage, loss) in enumerate(points):
        spot = f"{_LEFT + place * wide:.1f},{_HEIGHT - _LOW - loss * high:.1f}"
        lines.setdefault(stage, []).append(spot)
    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="training loss">']
    for share in (0.0, 0.5, 1.0):
        height = _HEIGHT - _LOW - share * top * high
        drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{height:.1f}" y2="{height:.1f}" stroke="#8884"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{share * top:.2f}</text>')
    for number, (stage, spots) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        drawn.append(f'<polyline points="{" ".join(spots)}" stroke="{colour}"/>')
        start = spots[0].partition(",")[0]
        drawn.append(f'<text x="{start}" y="{_HEIGHT - 8}" style="fill:{colour}">{html.escape(stage)}</text>')
    return "".join([*drawn, "</svg>"])


def _answer(row: Mapping[str, Any]) -> str:
    path = Path(row["image"])
    picture = (
        f"data:image/{'jpeg' if path.suffix == '.jpg' else 'png'};base64,{base64.b64encode(path.read_bytes()).decode()}"
    )
    word = "right" if row["right"] else "wrong"
    mark = "✓" if row["right"] else "✗"
    return (
        f'<figure><img src="{picture}" alt=""><figcaption><p><b>{html.escape(row["question"])}</b></p>'
        f"<p class={word}>{mark} {html.escape(row['answer']) or 'no words'} <span class=t>({word})</span></p>"
        f"<p class=t>target: {html.escape(str(row['target']))}</p></figcaption></figure>"
    )
