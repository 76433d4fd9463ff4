"""What do a model's heads do in one call: before the language model runs, and after?"""

from __future__ import annotations

from torch import Tensor

from mllm.errors import ConfigError
from mllm.heads.base import HeadModel, Reading, Step

TARGET = "target_"
"""Every argument of ``model(…)`` that teaches a head begins with it."""


def lay_targets(model: HeadModel, step: Step) -> None:
    """Take the targets out of ``step.inputs`` and let each head lay its own. Raises `ConfigError` for targets that no head of this
    model learns from."""
    given = {key: step.inputs.pop(key) for key in list(step.inputs) if key.startswith(TARGET)}
    given = {key: value for key, value in given.items() if value is not None}
    for name, head in model.heads.items():
        own = {key: given.pop(key) for key in head.targets if key in given}
        if own and len(own[head.targets[0]]):
            if step.input_ids is None:
                raise ConfigError(
                    f"{head.targets[0]}: input_ids are missing, and head {name!r} finds its places by them"
                )
            step.laid[name] = head.lay(model, step, own)
        elif not head.targets and step.labels is not None and step.input_ids is not None:
            step.laid[name] = head.lay(model, step, {})
    for key, value in given.items():
        if len(value):
            raise ConfigError(
                f"{key}: no head of this model learns from it; its heads: {', '.join(model.heads) or 'none'}"
            )


def head_losses(model: HeadModel, step: Step, reading: Reading) -> tuple[Tensor | float, dict[str, Tensor] | None]:
    """What the heads add to the loss, and ``<head>/<part>`` → value to report (None where nothing was to be answered)."""
    total: Tensor | float = 0.0
    report: dict[str, Tensor] = {}
    for name, head in model.heads.items():
        if step.laid.get(name) is not None:
            found = head.losses(model, step, step.laid[name], reading)
            total = total + found.total
            report |= {f"{name}/{part}": value for part, value in found.parts.items()}
        elif model.training and head.has_weights:
            total = total + head.idle()
    return total, report or None
