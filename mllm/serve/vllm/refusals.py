"""Which of our checkpoints can vLLM's language models not run?"""

from __future__ import annotations

from mllm.errors import UnavailableError
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.position_axes import SERVED_AS, has_axes


def refuse_unserved(config: MllmConfig) -> None:
    """Raise `UnavailableError`, naming the part and what to use instead, for a model that vLLM would run as another one.

    Args:
        config: of the checkpoint.
    """
    if config.connector is None:
        raise UnavailableError("this checkpoint is text-only (its config has no connector); serve its language model")
    if getattr(config, "modality_switch", False):
        raise UnavailableError(
            "this checkpoint has weights of their own for visual tokens in every decoder layer (modality_switch), which vLLM's "
            "language models have no place for; use mllm chat or model.generate"
        )
    kind = config.text_config.model_type
    if has_axes(config.text_config) and SERVED_AS[kind] is None:
        raise UnavailableError(
            f"this checkpoint's language model ({kind}) has positions of several axes, and was not tried in vLLM (those of "
            f"{', '.join(name for name, served in SERVED_AS.items() if served)} were); use mllm chat or model.generate"
        )
    for name, info in config.encoder_infos().items():
        if info.image.points or info.image.cameras:
            what = "depth and camera poses" if info.image.points else "known cameras"
            raise UnavailableError(
                f"encoder {name} of this checkpoint reads {what}, which a request to vLLM cannot carry; use mllm chat or "
                "model.generate"
            )
    for name, encoder in config.encoders.items():
        if encoder.get("reads"):
            raise UnavailableError(
                f"encoder {name} of this checkpoint reads the features of {encoder['reads']['encoder']}, and encoders in series were not "
                "tried in vLLM; use mllm chat or model.generate"
            )
    view = config.view_layout()
    if view.repeats > 1:
        raise UnavailableError(
            f"this checkpoint shows a picture {view.repeats} times (connector {config.connector['type']}), which was not tried in vLLM; "
            "use mllm chat or model.generate"
        )
    if view.fast is not None:
        raise UnavailableError(
            f"this checkpoint reads slow tokens in every {view.fast.every}. layer of its language model (connector "
            f"{config.connector['type']}), which vLLM's language models have no place for; use mllm chat or model.generate"
        )
    if view.beside:
        raise UnavailableError(
            f"this checkpoint's visual tokens read the encoders again inside its language model (connector {config.connector['type']}: "
            "inside), which vLLM's language models have no place for; use mllm chat or model.generate"
        )
    if view.levels:
        raise UnavailableError(
            f"this checkpoint adds visual tokens behind {view.levels} layers of its language model (connector "
            f"{config.connector['type']}), which vLLM's language models have no place for; use mllm chat or model.generate"
        )
