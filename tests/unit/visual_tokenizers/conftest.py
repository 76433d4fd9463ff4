"""What do the visual tokenizer tests share? The golden vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import fill

_GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@dataclass
class Case:
    """One golden case: inputs and reference weights as tensors, and the comparison."""

    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Any]
    weights: dict[str, Tensor]

    def check(self, **got: Any) -> None:
        """Every output of the case must be given, by its name without ``output.``, and agree."""
        names = {key.removeprefix("output.") for key in self.outputs}
        assert names == set(got), f"case outputs {sorted(names)}, given {sorted(got)}"
        arrays = {
            f"output.{k}": torch.as_tensor(v).detach().reshape(self.outputs[f"output.{k}"].shape).numpy()
            for k, v in got.items()
        }
        fill.check(self.meta, self.outputs, arrays)


@pytest.fixture
def golden():
    """Loads a golden case by name."""

    def load(name: str) -> Case:
        meta, inputs, outputs = fill.load(_GOLDEN / f"{name}.json")
        return Case(
            meta,
            {k.removeprefix("input."): torch.from_numpy(v) for k, v in inputs.items()},
            outputs,
            {k: torch.from_numpy(v) for k, v in fill.fill_all(meta).items()},
        )

    return load
