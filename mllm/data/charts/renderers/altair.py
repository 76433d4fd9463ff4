"""How does Vega-Lite, which Altair writes, draw a chart?"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mllm.data.charts.chart import Chart, shown
from mllm.data.charts.renderers import RENDERERS
from mllm.data.charts.renderers.base import Renderer, Style, colour
from mllm.errors import UnavailableError
from mllm.install import package_hint


@RENDERERS.register("altair")
class AltairRenderer(Renderer):
    """The specification that Altair would write, drawn by vl-convert without a browser."""

    @classmethod
    def require(cls) -> None:
        if importlib.util.find_spec("vl_convert") is None:
            raise UnavailableError(f"renderer altair needs vl-convert: {package_hint('vl-convert-python')}")

    def draw(self, charts: Sequence[tuple[Chart, Style]]) -> list[Image.Image]:
        self.require()
        vl_convert: Any = importlib.import_module("vl_convert")

        pictures = []
        for chart, style in charts:
            data = vl_convert.vegalite_to_png(self.specification(chart, style), scale=1)
            pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
        return pictures

    def specification(self, chart: Chart, style: Style) -> dict[str, Any]:
        """A chart as Vega-Lite."""
        size = style.font_size * 100 / 72
        axis = {
            "grid": style.grid,
            "labelFontSize": size,
            "titleFontSize": size,
            "labelLimit": 140,
            "labelOverlap": False,
        }
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
            "width": self.size, "height": self.size, "background": style.background, "padding": 6,
            "autosize": {"type": "fit", "contains": "padding"},
            "title": {"text": chart.title, "fontSize": size + 2, "fontWeight": "bold" if style.bold_title else "normal"},
            "data": {"values": _rows(chart)},
            "config": {
                "font": "DejaVu Serif" if style.serif else "DejaVu Sans", "axis": axis, "view": {"stroke": "#999999"},
                "legend": {"labelFontSize": size, "title": None, "orient": "right" if "right" in style.legend else "top"},
            },
            "layer": _layers(chart, style, size),
        }  # fmt: skip


def _rows(chart: Chart) -> list[dict[str, Any]]:
    if chart.type == "scatter":
        return [{"s": s.name, "x": x, "y": y} for s in chart.series for x, y in zip(s.x, s.values)]
    return [
        {"s": series.name, "c": label, "v": value, "t": shown(value), "n": place}
        for series in chart.series
        for place, (label, value) in enumerate(zip(chart.categories, series.values))
    ]


def _layers(chart: Chart, style: Style, size: float) -> list[dict[str, Any]]:
    several = len(chart.series) > 1
    paint: Any = {"value": colour(chart.series[0].colour)}
    if chart.colours:
        paint = _scale("c", chart.categories, chart.colours, legend=False)
    elif several:
        paint = _scale("s", [s.name for s in chart.series], [s.colour for s in chart.series], legend=True)
    if chart.type == "scatter":
        x, y = (
            {"field": f, "type": "quantitative", "title": t, "scale": {"zero": False}}
            for f, t in (("x", chart.x_label), ("y", chart.y_label))
        )
        return [
            {
                "mark": {"type": "circle", "size": 22 * style.line_width, "opacity": 0.9},
                "encoding": {"x": x, "y": y, "color": paint},
            }
        ]
    if chart.type == "pie":
        turn = {"theta": {"field": "v", "type": "quantitative", "stack": True}, "order": {"field": "n"}}
        label = {"field": "c", "type": "nominal"}
        text = {"type": "text", "radius": 150, "fontSize": size}
        layers = [
            {
                "mark": {"type": "arc", "outerRadius": 120, "stroke": style.background},
                "encoding": {**turn, "color": paint},
            },
            {"mark": text, "encoding": {**turn, "text": label}},
        ]
        if chart.printed:
            layers.append(
                {"mark": {**text, "radius": 75, "fill": "white"}, "encoding": {**turn, "text": {"field": "t"}}}
            )
        return layers
    names = {"field": "c", "type": "nominal", "sort": None, "title": chart.x_label}
    numbers = {"field": "v", "type": "quantitative", "title": chart.y_label, "stack": None}
    if chart.type == "line":
        numbers["scale"] = {"zero": False}
        encoding: dict[str, Any] = {"x": names, "y": numbers, "color": paint, "detail": {"field": "s"}}
        mark: dict[str, Any] = {"type": "line", "point": True, "strokeWidth": style.line_width * 1.3}
        moved: dict[str, Any] = {"dy": -10}
    else:
        lying = chart.type == "hbar"
        encoding = {"y" if lying else "x": names, "x" if lying else "y": numbers, "color": paint}
        if several:
            encoding["yOffset" if lying else "xOffset"] = {"field": "s", "sort": None}
        mark, moved = {"type": "bar"}, {"dx": 4, "align": "left"} if lying else {"dy": -7}
    layers = [{"mark": mark, "encoding": encoding}]
    if chart.printed:
        written = {key: value for key, value in encoding.items() if key != "color"} | {"text": {"field": "t"}}
        layers.append({"mark": {"type": "text", "fontSize": size - 1, **moved}, "encoding": written})
    return layers


def _scale(field: str, names: Sequence[str], colours: Sequence[str], *, legend: bool) -> dict[str, Any]:
    scale = {"domain": list(names), "range": [colour(c) for c in colours]}
    return {"field": field, "type": "nominal", "scale": scale, **({} if legend else {"legend": None})}
