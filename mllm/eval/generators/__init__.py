"""Who answers the questions: a model, vLLM, a server, a text model behind an OCR engine, or a plug-in's? GENERATORS lists them."""

from __future__ import annotations

from mllm.eval.generators.base import Generator, GeneratorSettings
from mllm.registry import Registry

GENERATORS: Registry = Registry(
    "generator",
    {
        "hf": "mllm.eval.generators.hf:HFGenerator",
        "vllm": "mllm.eval.generators.vllm:VLLMGenerator",
        "ocr": "mllm.eval.generators.ocr:OcrGenerator",
        "openai": "mllm.eval.generators.openai:OpenAIGenerator",
    },
)
__all__ = ["GENERATORS", "Generator", "GeneratorSettings"]
