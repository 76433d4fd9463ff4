"""Who answers the questions: a model in this process, vLLM, a server, or a plug-in's generator? GENERATORS lists them."""

from __future__ import annotations

from mllm.eval.generators.base import Generator, GeneratorSettings
from mllm.registry import Registry

GENERATORS: Registry = Registry(
    "generator",
    {
        "hf": "mllm.eval.generators.hf:HFGenerator",
        "vllm": "mllm.eval.generators.vllm:VLLMGenerator",
        "openai": "mllm.eval.generators.openai:OpenAIGenerator",
    },
)
__all__ = ["GENERATORS", "Generator", "GeneratorSettings"]
