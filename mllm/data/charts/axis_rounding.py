"""Which digits of a value can be read off an axis at all?

A value that stands on its mark is said as it is printed. One that is read off an axis is known to about the height of a line of text or
the width of a stroke: its last digits cannot be seen, and a model that is taught them learns to make them up.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mllm.data.charts.chart import Chart

_STEPS = (1, 2, 5)
_YEARS = (1800, 2100)


def step_of(span: float, share: float) -> float:
    """The largest step of an axis (1, 2 or 5 times a power of ten) that is no more than ``share`` of its length."""
    wanted = share * span
    power = 10.0 ** math.floor(math.log10(wanted))
    return max(step for number in _STEPS if (step := number * power) <= wanted * (1 + 1e-9))


def as_read(chart: Chart, share: float) -> Chart:
    """The chart as its axis tells it: values that are not printed lie on the nearest step of at most ``share`` of the axis. Zero stays
    zero and nothing else becomes zero; charts whose values all are whole years stay as they are, since a year is right or wrong."""
    values = [value for series in chart.series for value in series.values]
    if not share or chart.printed or not chart.span:
        return chart
    if all(value.is_integer() and _YEARS[0] <= value <= _YEARS[1] for value in map(float, values)):
        return chart
    step = step_of(chart.span, share)
    # `float` of a text: 3 times 0.1 is no longer number than 0.3
    rounded = {value: float(f"{round(value / step) * step:.6g}") or value for value in values}
    return replace(
        chart, series=tuple(replace(s, values=tuple(rounded[value] for value in s.values)) for s in chart.series)
    )
