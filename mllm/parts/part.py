"""What is a real model inside a package, as the catalogue says it?"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mllm.config import StrictModel


class Part(StrictModel):
    """A model inside a package."""

    name: str = ""
    package: str
    version: str
    file: str
    """Path inside the package's site folder."""
    sha256: str
    kind: Literal["gguf", "timm", "onnx"]
    architecture: str | None = None
    output: str | None = None
    licence: str
    commercial: bool | None = None
    what: str = ""
    check: dict[str, Any] = Field(default_factory=dict)
    """gguf: the mean loss on ``text``; others: mean and std of what comes out for a fixed picture."""
