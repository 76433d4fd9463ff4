"""How does matplotlib draw a chart?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mllm.data.charts.chart import Chart, shown
from mllm.data.charts.renderers import RENDERERS
from mllm.data.charts.renderers.base import Renderer, Style, colour

_DOTS = 100


@RENDERERS.register("matplotlib")
class MatplotlibRenderer(Renderer):
    """Agg, without pyplot and its global state."""

    def draw(self, charts: Sequence[tuple[Chart, Style]]) -> list[Image.Image]:
        return [self._one(chart, style) for chart, style in charts]

    def _one(self, chart: Chart, style: Style) -> Image.Image:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        family = "serif" if style.serif else "sans-serif"
        settings: Any = {"font.size": style.font_size, "font.family": family, "text.parse_math": False}
        with rc_context(settings):
            side = self.size / _DOTS
            figure = Figure(figsize=(side, side), dpi=_DOTS, facecolor=style.background)
            canvas = FigureCanvasAgg(figure)
            axes = figure.add_subplot(facecolor=style.background)
            axes.set_title(
                chart.title, fontsize=style.font_size + 2, fontweight="bold" if style.bold_title else "normal"
            )
            {"bar": _bars, "hbar": _bars, "line": _lines, "scatter": _points, "pie": _slices}[chart.type](
                axes, chart, style
            )
            if chart.type != "pie":
                _finish(axes, chart, style)
            _fit(axes, canvas)
            canvas.draw()
            return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _fit(axes: Any, canvas: Any) -> None:
    """Give the axes all the room that their labels leave. One measure: constrained layout takes three times as long."""
    side = canvas.get_width_height()[0]
    axes.set_position((0.15, 0.15, 0.75, 0.75))
    inside, outside = axes.get_window_extent(), axes.get_tightbbox(canvas.get_renderer())
    margin = 0.012 * side
    left, low = inside.x0 - outside.x0 + margin, inside.y0 - outside.y0 + margin
    right, top = outside.x1 - inside.x1 + margin, outside.y1 - inside.y1 + margin
    width, height = max(side - left - right, 0.3 * side), max(side - low - top, 0.3 * side)
    axes.set_position((left / side, low / side, width / side, height / side))


def _finish(axes: Any, chart: Chart, style: Style) -> None:
    across, up = (chart.y_label, chart.x_label) if chart.type == "hbar" else (chart.x_label, chart.y_label)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.ticklabel_format(axis="x" if chart.type == "hbar" else "y", style="plain", useOffset=False)
    if chart.type == "scatter":
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    if style.grid:
        axes.grid(axis="both" if chart.type == "scatter" else "x" if chart.type == "hbar" else "y", color="#d8d8d8")
        axes.set_axisbelow(True)
    if len(chart.series) > 1:
        axes.legend(loc=style.legend, fontsize=style.font_size - 0.5, framealpha=0.8)


def _bars(axes: Any, chart: Chart, style: Style) -> None:
    width = 0.75 / len(chart.series)
    places = np.arange(len(chart.categories))
    lying = chart.type == "hbar"
    for number, series in enumerate(chart.series):
        at = places + (number - (len(chart.series) - 1) / 2) * width
        fill = [colour(name) for name in chart.colours] or colour(series.colour)
        drawn = (axes.barh if lying else axes.bar)(at, series.values, width, color=fill, label=series.name)
        if chart.printed:
            axes.bar_label(drawn, labels=[shown(v) for v in series.values], padding=1, fontsize=style.font_size - 0.5)
    if lying:
        axes.set_yticks(places, chart.categories)
        axes.invert_yaxis()
    else:
        _slant(axes, places, chart.categories)
    if chart.printed:
        axes.margins(**{"x" if lying else "y": 0.12})


def _slant(axes: Any, places: Sequence[float] | np.ndarray, labels: Sequence[str]) -> None:
    long = sum(map(len, labels)) > 36
    axes.set_xticks(
        places, labels, rotation=40 if long else 0, ha="right" if long else "center", rotation_mode="anchor"
    )


def _lines(axes: Any, chart: Chart, style: Style) -> None:
    places = np.arange(len(chart.categories))
    for series in chart.series:
        axes.plot(
            places,
            series.values,
            color=colour(series.colour),
            label=series.name,
            linewidth=style.line_width,
            marker="o",
        )
        if chart.printed:
            for x, y in zip(places, series.values):
                axes.annotate(
                    shown(y), (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=style.font_size - 0.5
                )
    if chart.printed:
        axes.margins(y=0.12)
    _slant(axes, places, chart.categories)


def _points(axes: Any, chart: Chart, style: Style) -> None:
    for series in chart.series:
        axes.scatter(series.x, series.values, color=colour(series.colour), label=series.name, s=9 * style.line_width)


def _slices(axes: Any, chart: Chart, style: Style) -> None:
    (series,) = chart.series
    total = sum(series.values)
    names = [f"{n}\n{shown(v)}" if chart.printed else n for n, v in zip(chart.categories, series.values)]
    axes.pie(
        [v / total for v in series.values], labels=names, colors=[colour(c) for c in chart.colours], startangle=90,
        counterclock=False, radius=0.9, textprops={"fontsize": style.font_size}, wedgeprops={"edgecolor": style.background},
    )  # fmt: skip
