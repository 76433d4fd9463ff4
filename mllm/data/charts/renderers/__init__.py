"""Who draws charts? RENDERERS lists them; a plug-in registers its own with ``@RENDERERS.register("name")``."""

from mllm.registry import Registry

RENDERERS: Registry = Registry(
    "renderer",
    {
        "matplotlib": "mllm.data.charts.renderers.matplotlib:MatplotlibRenderer",
        "altair": "mllm.data.charts.renderers.altair:AltairRenderer",
        "ggplot2": "mllm.data.charts.renderers.ggplot2:Ggplot2Renderer",
        "gnuplot": "mllm.data.charts.renderers.gnuplot:GnuplotRenderer",
    },
)
