"""Under which name does lmms-eval find our models?"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` gives lmms-eval: the model ``mllm``, as chat model (pictures stay where
    the task puts them) and as simple model (pictures first; likelihoods)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    place = "mllm.eval.harnesses.lmms_eval_model"
    return ModelManifest("mllm", simple_class_path=f"{place}.MllmSimple", chat_class_path=f"{place}.MllmChat")
