"""How does vLLM come to know our architecture? It calls `register` through the entry point ``vllm.general_plugins``."""

from __future__ import annotations

import os


def register() -> None:
    """Register config, processor and model class; no remote code is needed afterwards.

    vLLM calls this in every process it starts (API server, engine core, worker, model inspection), sometimes more
    than once, so it is cheap, repeatable and touches no device. Encoders, connectors and routers of third parties
    (entry points ``mllm.plugins``) are registered as well, since a served checkpoint may be built from them.
    """
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    from mllm.models.registration import ARCHITECTURE
    from mllm.models.registration import register as register_with_transformers
    from mllm.plugins import load_plugins
    from mllm.serve.vllm.videos import register_loader

    load_plugins()
    register_with_transformers()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"mllm.serve.vllm.model:{ARCHITECTURE}")
    register_loader()
    if current_platform.is_cpu():
        from mllm.serve.vllm.cpu_adapters import keep_rows_without_adapters

        keep_rows_without_adapters()
    if os.environ.get("MLLM_ADMISSION"):  # a process of `mllm serve`
        _limit_heads()


def _limit_heads() -> None:
    """Have uvicorn read requests by `mllm.serve.http.heads`, where it reads them with httptools; h11 has limits."""
    from uvicorn.config import HTTP_PROTOCOLS
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    if AutoHTTPProtocol.__name__ == "HttpToolsProtocol":
        HTTP_PROTOCOLS["auto"] = "mllm.serve.http.heads:LimitedHeads"
