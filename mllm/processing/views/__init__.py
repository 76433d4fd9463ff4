"""Where do the ways of looking at a picture live? VIEWS lists them; one file per idea."""

from mllm.registry import Registry

VIEWS: Registry = Registry(
    "views",
    {
        "single": "mllm.processing.views.single:SingleView",
        "dual_perspective": "mllm.processing.views.dual_perspective:DualPerspective",
        "multi_scale": "mllm.processing.views.multi_scale:MultiScale",
        "native": "mllm.processing.views.native:Native",
        "tiles": "mllm.processing.views.tiles:Tiles",
    },
)
