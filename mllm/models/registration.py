"""How do transformers' Auto classes come to know ours?"""

from __future__ import annotations

ARCHITECTURE = "MllmForConditionalGeneration"


def register() -> None:
    """Register config, models and processors with the Auto classes; cheap and safe to repeat.

    The class also becomes an attribute of ``transformers``: vLLM's Transformers backend looks architectures up there, and
    finding it makes remote code unnecessary.
    """
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from mllm.models.configuration_mllm import MllmConfig
    from mllm.models.modeling_mllm import MllmForConditionalGeneration, MllmModel
    from mllm.processing.image_processor import MllmImageProcessor
    from mllm.processing.processor import MllmProcessor

    AutoConfig.register(MllmConfig.model_type, MllmConfig, exist_ok=True)
    AutoModel.register(MllmConfig, MllmModel, exist_ok=True)
    AutoModelForImageTextToText.register(MllmConfig, MllmForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        MllmConfig,
        image_processor_classes={"torchvision": MllmImageProcessor, "pil": MllmImageProcessor},
        exist_ok=True,
    )
    AutoProcessor.register(MllmConfig, MllmProcessor, exist_ok=True)
    for cls in (MllmForConditionalGeneration, MllmModel, MllmProcessor, MllmImageProcessor):
        setattr(transformers, cls.__name__, cls)
