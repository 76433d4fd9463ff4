"""Who answers the questions: a model in this process, vLLM, or a server?"""

from __future__ import annotations

from mllm.eval.generators.base import Generator

__all__ = ["Generator"]
