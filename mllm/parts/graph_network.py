"""How does torch run, and train, a network that is written as a list of ONNX nodes?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_START = 0.85


class GraphNetwork(nn.Module):
    """A network written as a list of ONNX nodes; every weight of it is a parameter."""

    def __init__(self, graph: dict[str, Any]):
        super().__init__()
        self.graph = graph
        self.keys = {name: name.replace(".", "__") for name in graph["weights"]}
        for name, shape in graph["weights"].items():
            self.register_parameter(self.keys[name], nn.Parameter(torch.empty(shape)))
        last = {name: place for place, (_, inputs, _, _) in enumerate(graph["nodes"]) for name in inputs}
        last.pop(graph["output"], None)
        self.spent = [[n for n in dict.fromkeys(node[1]) if last.get(n) == k] for k, node in enumerate(graph["nodes"])]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming's start for convolutions, a little smaller: with nothing that normalises in between, its own grows a
        thousandfold through fifty of them. 1 for what multiplies, 0 for what is added."""
        for op, inputs, _, _ in self.graph["nodes"]:
            for place, name in enumerate(inputs):
                if name not in self.keys:
                    continue
                weight = getattr(self, self.keys[name])
                if op == "Conv" and place == 1:
                    nn.init.kaiming_normal_(weight, nonlinearity="relu")
                    weight.mul_(_START)
                else:
                    nn.init.constant_(weight, 1.0 if op in ("Mul", "Div") else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {self.graph["input"]: x, **self.graph["constants"]}
        for (op, inputs, output, attributes), spent in zip(self.graph["nodes"], self.spent, strict=True):
            given = [getattr(self, self.keys[n]) if n in self.keys else values[n] for n in inputs]
            values[output] = _run(op, given, attributes)
            del given
            for name in spent:
                values.pop(name, None)
        return values[self.graph["output"]]


def _run(op: str, v: list[Any], a: dict[str, Any]) -> Any:
    x = v[0]
    if op == "Conv":
        low, high = _padding(x, v[1].shape[-2:], a)
        bias = v[2] if len(v) > 2 else None
        strides, dilations = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
        if low == high:
            return F.conv2d(x, v[1], bias, strides, low, dilations, a.get("group", 1))
        return F.conv2d(F.pad(x, _sides(low, high)), v[1], bias, strides, 0, dilations, a.get("group", 1))
    if op == "MaxPool":
        low, high = _padding(x, a["kernel_shape"], a)
        return F.max_pool2d(
            F.pad(x, _sides(low, high), value=float("-inf")), a["kernel_shape"], a.get("strides", [1, 1])
        )
    if op in _BINARY:
        return _BINARY[op](x, v[1])
    if op in _UNARY:
        return _UNARY[op](x)
    if op == "HardSigmoid":
        return (x * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1)
    if op == "GlobalAveragePool":
        return x.mean((-2, -1), keepdim=True)
    if op == "ReduceMean":
        return x.mean(a["axes"], keepdim=bool(a.get("keepdims", 1)))
    if op == "Concat":
        return torch.cat(v, a["axis"])
    assert op == "Resize", op
    return F.interpolate(x, scale_factor=v[2][-2:], mode="nearest")


_BINARY: dict[str, Any] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}
_UNARY: dict[str, Any] = {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Erf": torch.erf}
OPERATIONS = {
    "Conv",
    "MaxPool",
    "HardSigmoid",
    "GlobalAveragePool",
    "ReduceMean",
    "Concat",
    "Resize",
    *_BINARY,
    *_UNARY,
}


def _padding(x: Tensor, kernel: Any, a: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Rows and columns of padding before and after."""
    if a.get("auto_pad", "NOTSET") == "SAME_UPPER":
        strides, dilations = a.get("strides", [1, 1]), a.get("dilations", [1, 1])
        total = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, s, k, d in zip(x.shape[-2:], strides, kernel, dilations)
        ]
        low = [t // 2 for t in total]
        return low, [t - b for t, b in zip(total, low)]
    pads = a.get("pads", [0, 0, 0, 0])
    return list(pads[:2]), list(pads[2:])


def _sides(low: list[int], high: list[int]) -> tuple[int, int, int, int]:
    return low[1], high[1], low[0], high[0]
