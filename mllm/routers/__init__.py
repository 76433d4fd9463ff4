"""Where do routers live? ROUTERS lists them."""

from mllm.registry import Registry

ROUTERS: Registry = Registry(
    "router",
    {
        "constant": "mllm.routers.constant:ConstantRouter",
        "gate": "mllm.routers.gate:GateRouter",
        "language_model": "mllm.routers.language_model:LanguageModelRouter",
    },
)
