"""How is a recipe trained? `run_recipe` is the entry point."""

from __future__ import annotations

from typing import Any

__all__ = ["run_recipe"]


def __getattr__(name: str) -> Any:
    if name == "run_recipe":
        from mllm.train.run import run_recipe

        return run_recipe
    raise AttributeError(f"module 'mllm.train' has no attribute {name!r}")
