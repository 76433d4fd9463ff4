"""How does gnuplot draw a chart?"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mllm.data.charts.chart import Chart, shown
from mllm.data.charts.renderers import RENDERERS
from mllm.data.charts.renderers.base import Renderer, Style, colour
from mllm.errors import DataError, UnavailableError


@RENDERERS.register("gnuplot")
class GnuplotRenderer(Renderer):
    """gnuplot's pngcairo terminal; one process draws all charts of a call."""

    @classmethod
    def require(cls) -> None:
        if shutil.which("gnuplot") is None:
            raise UnavailableError("renderer gnuplot needs the gnuplot program: apt install gnuplot-nox")

    def draw(self, charts: Sequence[tuple[Chart, Style]]) -> list[Image.Image]:
        self.require()
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.png" for number in range(len(charts))]
            script = "\n".join(self._script(chart, style, path) for (chart, style), path in zip(charts, paths))
            done = subprocess.run(["gnuplot"], input=script, capture_output=True, text=True, check=False)
            if done.returncode or not all(path.is_file() and path.stat().st_size for path in paths):
                raise DataError(f"gnuplot: {' '.join(done.stderr.split())[-300:] or 'no picture came out'}")
            return [Image.open(path).convert("RGB") for path in paths]

    def _script(self, chart: Chart, style: Style, path: Path) -> str:
        family = "DejaVu Serif" if style.serif else "DejaVu Sans"
        lines = [
            "reset",
            f"set terminal pngcairo size {self.size},{self.size} noenhanced font '{family},{style.font_size * 1.05:.1f}' "
            f"background rgb '{style.background}'",
            f"set output '{path}'",
            f"set title {_quoted(chart.title)}"
            + (f" font '{family} Bold,{style.font_size + 2:.1f}'" if style.bold_title else ""),
            "set key above" if len(chart.series) > 1 else "unset key",
            "set grid" if style.grid else "",
        ]
        if chart.type == "pie":
            return "\n".join([*lines, *_slices(chart)])
        across, up = (chart.y_label, chart.x_label) if chart.type == "hbar" else (chart.x_label, chart.y_label)
        lines += [
            f"set xlabel {_quoted(across)}",
            f"set ylabel {_quoted(up)}",
            "set format x '%g'",
            "set format y '%g'",
        ]
        drawn = {"bar": _bars, "hbar": _bars, "line": _lines, "scatter": _points}[chart.type](chart, style)
        return "\n".join([*lines, *drawn])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _plot(parts: list[tuple[str, list[str]]]) -> list[str]:
    """A plot command with its data written behind it."""
    return [
        "plot " + ", ".join(f"'-' {how}" for how, _ in parts),
        *(line for _, rows in parts for line in (*rows, "e")),
    ]


def _names(chart: Chart, axis: str) -> str:
    ticks = ", ".join(f"{_quoted(label)} {place}" for place, label in enumerate(chart.categories))
    turned = " rotate by -40" if axis == "x" and sum(map(len, chart.categories)) > 36 else ""
    return f"set {axis}tics ({ticks}){turned}"


def _bars(chart: Chart, style: Style) -> list[str]:
    lying, count = chart.type == "hbar", len(chart.series)
    width = 0.75 / count
    top = max(v for s in chart.series for v in s.values) * (1.15 if chart.printed else 1.05)
    names, numbers = ("y", "x") if lying else ("x", "y")
    edges = (len(chart.categories) - 0.5, -0.5) if lying else (-0.5, len(chart.categories) - 0.5)
    lines = [
        _names(chart, names),
        f"set {names}range [{edges[0]}:{edges[1]}]",
        f"set {numbers}range [0:{top:g}]",
        "set style fill solid 1.0 noborder",
    ]
    parts = []
    for number, series in enumerate(chart.series):
        rows, texts = [], []
        paints = [colour(c) for c in chart.colours] or [colour(series.colour)] * len(series.values)
        for place, (value, paint) in enumerate(zip(series.values, paints)):
            low = place + (number - count / 2) * width
            box = (0, value, low, low + width) if lying else (low, low + width, 0, value)
            rows.append(" ".join(f"{v:.9g}" for v in (box[1], box[3], *box)) + f" {int(paint[1:], 16)}")
            at = (value, low + width / 2) if lying else (low + width / 2, value)
            texts.append(f"{at[0]:.9g} {at[1]:.9g} {shown(value)}")
        # a row's own colour, and the legend's from the line type
        parts.append(("using 1:2:3:4:5:6:7 with boxxyerror lc rgb variable notitle", rows))
        if count > 1:
            parts.append(
                (f"using 1:2 with boxes lc rgb '{colour(series.colour)}' title {_quoted(series.name)}", ["NaN NaN"])
            )
        if chart.printed:
            parts.append((f"using 1:2:3 with labels {'left offset 0.4,0' if lying else 'offset 0,0.5'} notitle", texts))
    return lines + _plot(parts)


def _lines(chart: Chart, style: Style) -> list[str]:
    parts = []
    for series in chart.series:
        rows = [f"{place} {value:.9g} {shown(value)}" for place, value in enumerate(series.values)]
        paint = colour(series.colour)
        parts.append(
            (
                f"using 1:2 with linespoints lc rgb '{paint}' lw {style.line_width:.1f} pt 7 ps 0.8 title {_quoted(series.name)}",
                rows,
            )
        )
        if chart.printed:
            parts.append(("using 1:2:3 with labels offset 0,0.7 notitle", rows))
    return [_names(chart, "x"), f"set xrange [-0.3:{len(chart.categories) - 0.7}]", *_plot(parts)]


def _points(chart: Chart, style: Style) -> list[str]:
    return _plot(
        [
            (
                f"using 1:2 with points lc rgb '{colour(s.colour)}' pt 7 ps {0.35 * style.line_width:.2f} title {_quoted(s.name)}",
                [f"{x:.9g} {y:.9g}" for x, y in zip(s.x, s.values)],
            )
            for s in chart.series
        ]
    )


def _slices(chart: Chart) -> list[str]:
    """Arcs as objects: gnuplot has no pie of its own."""
    values, total = chart.series[0].values, sum(chart.series[0].values)
    lines = [
        "unset border",
        "unset tics",
        "unset grid",
        "set size ratio -1",
        "set xrange [-1.5:1.5]",
        "set yrange [-1.5:1.5]",
    ]
    end = 90.0
    for number, (label, name, value) in enumerate(zip(chart.categories, chart.colours, values), 1):
        start = end - 360 * value / total
        arc = f"arc [{start % 360:.4f}:{start % 360 + 360 * value / total:.4f}]"
        lines.append(
            f"set object {number} circle at 0,0 size 1 {arc} fillcolor rgb '{colour(name)}' fillstyle solid noborder"
        )
        middle = math.radians((start + end) / 2)
        text = f"{label} {shown(value)}" if chart.printed else label
        side = "left" if math.cos(middle) > 0.2 else "right" if math.cos(middle) < -0.2 else "center"
        lines.append(
            f"set label {number} {_quoted(text)} at {1.08 * math.cos(middle):.4f},{1.12 * math.sin(middle):.4f} {side}"
        )
        end = start
    return [*lines, "plot NaN notitle"]
