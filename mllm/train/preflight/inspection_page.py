"""How does one self-contained HTML page show what the model sees?"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from PIL import Image

from mllm.processing.layout import token_cells
from mllm.train.preflight.inspection import Picture, Run, SeenRow, SeenSample, SeenStage
from mllm.train.preflight.inspection_masks import SeenMask
from mllm.types import Grid

_LARGEST = 448
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin-top:3rem;border-bottom:2px solid #222}h3{margin:2rem 0 .3rem}.dim{color:#777}
.text{white-space:pre-wrap;word-break:break-word;background:#fafafa;border:1px solid #ddd;padding:.7rem;border-radius:4px}
.learned{background:#bfe8c4}.masked{color:#777}.special{color:#a33;background:#f6e5e5;border-radius:3px}
.image{background:#cfe0f7;border-radius:3px;padding:0 .3rem}
.pictures{display:flex;flex-wrap:wrap;gap:1.2rem;margin:.6rem 0}figure{margin:0}figcaption{font-size:13px;color:#555}
.frame{position:relative;display:inline-block;line-height:0}.frame img{width:16rem;height:auto;image-rendering:pixelated}
.frame svg{position:absolute;inset:0;width:100%;height:100%}
.frame rect{fill:transparent;stroke:#808080;stroke-opacity:.6;stroke-width:1;vector-effect:non-scaling-stroke}
.frame rect.tile{stroke:#e6007e;stroke-opacity:1;stroke-width:3;pointer-events:none}
.frame rect:hover{fill:#ffd40088;stroke:#d00}
.bar{display:flex;height:1.6rem;border:1px solid #999;margin:.4rem 0;font-size:12px;overflow:hidden}
.bar span{overflow:hidden;white-space:nowrap;text-align:center;border-right:2px solid #222;background:#e4edc9}
.bar span.pad{background:repeating-linear-gradient(45deg,#eee,#eee 5px,#ccc 5px,#ccc 10px);border:0}
.bar span:nth-child(even):not(.pad){background:#f3dcb8}.warn{color:#a30000;font-weight:600}
details{margin:.4rem 0}code{font-size:13px;word-break:break-all}
"""
_LEGEND = (
    "<p><span class=learned>carries loss</span> · <span class=masked>read, no loss</span> · <span class=special>special "
    "token, no loss</span> · <span class=image>image span</span>. Pictures are what each encoder is given, normalisation "
    "undone; lines are its own patches, or the visual tokens where the connector keeps a grid; masks are red, and grey where they do not "
    "count. Point at a cell for the token it "
    "becomes, and at text for its positions.</p>"
)


def write_page(stages: list[SeenStage], path: Path, *, title: str) -> Path:
    """Write the page; it needs no other file and no network."""
    body = "".join(_stage(stage) for stage in stages)
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_e(title)}</title><style>{_STYLE}</style>"
        f"<h1>{_e(title)}</h1>{_LEGEND}{body}</html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _stage(seen: SeenStage) -> str:
    stage = seen.stage
    rows = f"packed to {stage.max_length}" if stage.packing else f"padded, at most {stage.max_length}"
    if stage.group_by_length:
        rows += ", grouped by length"
    parts = [
        f"<h2>stage {_e(stage.name)}</h2><p>rows {rows} tokens · batch {stage.batch_size} · learns "
        f"{_e(', '.join(f'{part} at {spec.lr:g}' for part, spec in stage.learning().items()))}</p>",
        f"<details><summary>chat template</summary><code>{_e(seen.template)}</code></details>",
    ]
    if seen.dropped:
        items = "".join(f"<li>{_e(d.dataset)}/{_e(d.id)}: {_e(d.reason)}</li>" for d in seen.dropped)
        parts.append(
            f"<p class=warn>{len(seen.dropped)} samples could not be used and were replaced:</p><ul>{items}</ul>"
        )
    parts += [_row(number, row, seen) for number, row in enumerate(seen.rows)]
    return "".join(parts)


def _row(number: int, row: SeenRow, seen: SeenStage) -> str:
    used = sum(sample.length for sample in row.samples)
    packed = row.bounds is not None
    head = f"<h3>row {number}</h3><p class=dim>{row.slots} slots, {used} used ({used / row.slots:.0%})"
    if packed:
        head += f" · {len(row.samples)} samples, each attends only to itself, positions start again at 0 · attention's bounds: {row.bounds}"
    bars = "".join(
        f'<span style="width:{100 * s.length / row.slots:.2f}%" title="{_e(s.id)}: slots {s.offset} to {s.offset + s.length - 1}, '
        f'positions {s.positions[0]} to {s.positions[1]}">{s.positions[0]}…{s.positions[1]}</span>'
        for s in row.samples
    )
    rest = row.slots - used
    bars += (
        f'<span class=pad style="width:{100 * rest / row.slots:.2f}%" title="{rest} slots of padding"></span>'
        if rest
        else ""
    )
    return f"{head}</p><div class=bar>{bars}</div>" + "".join(_sample(sample, seen) for sample in row.samples)


def _sample(sample: SeenSample, seen: SeenStage) -> str:
    cut = " <span class=warn>cut at max_length</span>" if sample.truncated else ""
    nothing = "" if sample.num_learned else " <span class=warn>nothing carries loss</span>"
    figures = "".join(
        f"<div class=pictures>{''.join(_figure(name, image, picture, seen) for name, image in picture.pixels.items())}</div>"
        for picture in sample.pictures
    )
    if sample.masks:
        figures += (
            f"<div class=pictures>{''.join(_mask(number, mask) for number, mask in enumerate(sample.masks))}</div>"
        )
    text = "".join(_run(run) for run in sample.runs)
    return (
        f"<p><b>{_e(sample.dataset)}/{_e(sample.id)}</b> <span class=dim>{sample.length} tokens, {sample.num_learned} carry "
        f"loss, positions {sample.positions[0]} to {sample.positions[1]}</span>{cut}{nothing}</p>{figures}<div class=text>{text}</div>"
        f"<details><summary>what the loss is taken on</summary><div class=text>{_e(sample.learned)}</div></details>"
        f"<details><summary>token ids</summary><code>{' '.join(map(str, sample.ids))}</code></details>"
    )


def _mask(number: int, mask: SeenMask) -> str:
    what = "is learned" if mask.learned else "is shown by the question"
    size = f"marks {mask.share:.1%}" if mask.share else "marks nothing"
    return (
        f'<figure><div class=frame><img src="{_data(mask.seen)}" alt=""></div><figcaption>mask {number} of token {mask.token}, on image '
        f"{mask.number}: {size}, {what}</figcaption></figure>"
    )


def _run(run: Run) -> str:
    where = f"tokens {run.start} to {run.stop - 1}"
    if run.kind == "image":
        shape = f", {run.layout.grid[1]} × {run.layout.grid[2]}" if run.layout is not None else ""
        return f'<span class=image title="{where}">⟨image: {run.stop - run.start} tokens{shape}, {run.start} to {run.stop - 1}⟩</span>'
    return f'<span class={run.kind} title="{where}">{_e(run.text)}</span>'


def _figure(name: str, image: Image.Image, picture: Picture, seen: SeenStage) -> str:
    rows, columns, height, width = seen.grids[name]
    tokens = token_cells(picture.layout, seen.rules.view, picture.view)
    patches = picture.layout.patches
    if patches is not None:
        side = height // rows
        (rows, columns), height, width = patches, patches[0] * side, patches[1] * side
    if tokens:
        cell = seen.rules.view.cell or 1
        view = seen.rules.view.grid if patches is None else (patches[0] // cell, patches[1] // cell)
        label = lambda r, c: f"token {picture.start + tokens[r, c]}" if (r, c) in tokens else "no token: padding"  # noqa: E731
        lines = f"{view[0]} × {view[1]} visual tokens"
    else:
        view = (rows, columns)
        label = lambda r, c: f"patch {r * columns + c}"  # noqa: E731
        lines = "its patches"
    several = f", view {picture.view}" if picture.layout.num_views > 1 else ""
    if picture.layout.frames:
        when = "" if picture.seconds is None else f" at {picture.seconds:.3f} s"
        several = f", frame {picture.view}{when}"
    cells = _cells(*view, label) + _tiles(picture, view)
    return (
        f'<figure><div class=frame><img src="{_data(image)}" alt=""><svg viewBox="0 0 {view[1]} {view[0]}" '
        f'preserveAspectRatio="none">{cells}</svg></div><figcaption>image {picture.number}{several} as '
        f"<b>{_e(name)}</b> sees it: {height} × {width} pixels → {rows} × {columns} patches; lines: {lines}</figcaption></figure>"
    )


def _tiles(picture: Picture, grid: Grid) -> str:
    """On the thumbnail, the frames of the tiles that the picture is cut into."""
    layout = picture.layout
    if picture.view != layout.thumbnail or len(layout.corners) < 2:
        return ""
    frames = []
    for number, box in enumerate(layout.corners):
        top, left, bottom, right = (min(max(side, 0.0), 1.0) for side in box)
        x, y, width, height = left * grid[1], top * grid[0], (right - left) * grid[1], (bottom - top) * grid[0]
        frames.append(
            f'<rect class="tile" x="{x:.3f}" y="{y:.3f}" width="{width:.3f}" height="{height:.3f}"><title>tile {number}</title></rect>'
        )
    return "".join(frames)


def _cells(rows: int, columns: int, label) -> str:
    return "".join(
        f'<rect x="{c}" y="{r}" width="1" height="1"><title>{label(r, c)} (row {r}, column {c})</title></rect>'
        for r in range(rows)
        for c in range(columns)
    )


def _data(image: Image.Image) -> str:
    """The picture inside the page: exact where it is small, at most `_LARGEST` pixels a side."""
    image = image.copy()
    large = max(image.size) > _LARGEST
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if large else "PNG", **({"quality": 92} if large else {}))
    kind = "jpeg" if large else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _e(text: object) -> str:
    return html.escape(str(text))
