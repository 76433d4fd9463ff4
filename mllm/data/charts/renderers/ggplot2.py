"""How does R's ggplot2 draw a chart?"""

from __future__ import annotations

import json
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

_THEMES = ("theme_gray", "theme_bw", "theme_minimal", "theme_classic")


@RENDERERS.register("ggplot2")
class Ggplot2Renderer(Renderer):
    """ggplot2 through Rscript; one process draws all charts of a call."""

    @classmethod
    def require(cls) -> None:
        if shutil.which("Rscript") is None:
            raise UnavailableError("renderer ggplot2 needs R and ggplot2: apt install r-cran-ggplot2")

    def draw(self, charts: Sequence[tuple[Chart, Style]]) -> list[Image.Image]:
        self.require()
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.png" for number in range(len(charts))]
            lines = ["suppressMessages(library(ggplot2))"]
            lines += [self._script(chart, style, path) for (chart, style), path in zip(charts, paths)]
            script = Path(folder) / "draw.R"
            script.write_text("\n".join(lines), encoding="utf-8")
            done = subprocess.run(["Rscript", "--vanilla", str(script)], capture_output=True, text=True, check=False)
            if done.returncode or not all(path.is_file() for path in paths):
                raise DataError(f"ggplot2: {' '.join(done.stderr.split())[-300:] or 'no picture came out'}")
            return [Image.open(path).convert("RGB") for path in paths]

    def _script(self, chart: Chart, style: Style, path: Path) -> str:
        theme = _THEMES[int(style.line_width * 10) % len(_THEMES)]
        family = "serif" if style.serif else "sans"
        looks = [
            f"{theme}(base_size = {style.font_size * 1.15:.1f}, base_family = '{family}')",
            "theme(legend.title = element_blank()"
            + (", plot.title = element_text(face = 'bold'))" if style.bold_title else ")"),
        ]
        plot = " + ".join([*_plot(chart, style), f"labs(title = {_text(chart.title)})", *looks, *_after(chart)])
        side = f"width = {self.size / 100}, height = {self.size / 100}, dpi = 100"
        options = f"{side}, type = 'cairo', bg = {_text(style.background)}"
        return f"p <- {plot}\nsuppressWarnings(ggsave({_text(str(path))}, p, {options}))"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _vector(values: Sequence[object]) -> str:
    return "c(" + ", ".join(_text(v) if isinstance(v, str) else f"{v:.9g}" for v in values) + ")"


def _factor(values: Sequence[str], levels: Sequence[str]) -> str:
    return f"factor({_vector(values)}, levels = {_vector(levels)})"


def _plot(chart: Chart, style: Style) -> list[str]:
    names = [s.name for s in chart.series]
    of = _factor([s.name for s in chart.series for _ in s.values], names)
    paints = f"values = setNames({_vector([colour(s.colour) for s in chart.series])}, {_vector(names)})"
    labels = f"labs(x = {_text(chart.x_label)}, y = {_text(chart.y_label)})"
    many = len(chart.series) > 1
    guide = "" if many else ", guide = 'none'"
    if chart.type == "scatter":
        x, y = ([v for s in chart.series for v in getattr(s, name)] for name in ("x", "values"))
        data = f"data.frame(x = {_vector(x)}, y = {_vector(y)}, s = {of})"
        return [
            f"ggplot({data}, aes(x, y, colour = s))",
            f"geom_point(size = {style.line_width:.1f})",
            f"scale_colour_manual({paints}{guide})",
            labels,
        ]
    values = [v for s in chart.series for v in s.values]
    cells = _factor(list(chart.categories) * len(chart.series), chart.categories)
    data = f"data.frame(c = {cells}, v = {_vector(values)}, s = {of}, t = {_vector([shown(v) for v in values])})"
    size = style.font_size / 3.2
    if chart.type == "line":
        parts = [
            f"ggplot({data}, aes(c, v, colour = s, group = s))",
            f"geom_line(linewidth = {style.line_width / 2:.2f})",
            "geom_point(size = 1.8)",
        ]
        parts += (
            [f"geom_text(aes(label = t), vjust = -0.7, colour = 'black', size = {size:.2f})"] if chart.printed else []
        )
        return [*parts, f"scale_colour_manual({paints}{guide})", labels]
    if chart.colours:
        own = f"values = setNames({_vector([colour(c) for c in chart.colours])}, {_vector(chart.categories)})"
        fill, scale = "c", f"scale_fill_manual({own}, guide = 'none')"
    else:
        fill, scale = "s", f"scale_fill_manual({paints}{guide})"
    if chart.type == "pie":
        return [
            f"ggplot({data}, aes(x = '', y = v, fill = c))",
            f"geom_col(width = 1, colour = '{style.background}', position = position_stack(reverse = TRUE))",
            f"geom_text(aes(x = 1.68, label = {'paste(c, t, sep = ' + _text(chr(10)) + ')' if chart.printed else 'c'}), size = {size:.2f}, "
            "position = position_stack(vjust = 0.5, reverse = TRUE))",
            scale, "labs(x = NULL, y = NULL)",
        ]  # fmt: skip
    dodge = "position_dodge(width = 0.8)"
    parts = [f"ggplot({data}, aes(c, v, fill = {fill}, group = s))", f"geom_col(width = 0.75, position = {dodge})"]
    if chart.printed:
        place = "hjust = -0.15" if chart.type == "hbar" else "vjust = -0.4"
        parts.append(f"geom_text(aes(label = t), {place}, position = {dodge}, size = {size:.2f})")
        parts.append("scale_y_continuous(expand = expansion(mult = c(0, 0.15)))")
    return [*parts, scale, labels]


def _after(chart: Chart) -> list[str]:
    """What a theme would undo when it came later."""
    if chart.type == "pie":
        return [
            "coord_polar('y')",
            "theme(axis.text = element_blank(), axis.ticks = element_blank(), panel.grid = element_blank())",
        ]
    if chart.type == "hbar":
        return ["coord_flip()", "scale_x_discrete(limits = rev)"]
    if sum(map(len, chart.categories)) > 36:
        return ["theme(axis.text.x = element_text(angle = 40, hjust = 1))"]
    return []
