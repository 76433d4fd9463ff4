"""How does an ONNX network become plain weights and a list of nodes that torch can run and train?"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.errors import CheckpointError, UnavailableError
from mllm.install import package_hint


def read_onnx(source: Path, output: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(graph, weights) of an ONNX file, cut after the value ``output``.

    graph: input, output, nodes ``[operation, inputs, output, attributes]``, constants (single numbers and what is no fp32) and
    weights (name → shape). Raises `UnavailableError` without the onnx package.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UnavailableError(f"{source.name}: reading it needs the onnx package: {package_hint('onnx')}")
    onnx: Any = importlib.import_module("onnx")
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")

    model = onnx.load(str(source))
    weights, constants = {}, {}
    for item in model.graph.initializer:
        array = numpy_helper.to_array(item)
        if array.dtype == np.float32 and array.size > 1 and array.ndim > 1:
            weights[item.name] = torch.from_numpy(array.copy())
        else:
            constants[item.name] = (
                array.reshape(-1).tolist()[0] if array.size == 1 and array.dtype == np.float32 else array.tolist()
            )
    nodes, alias = [], {}
    for node in model.graph.node:
        inputs = [alias.get(name, name) for name in node.input]
        if node.op_type == "Identity":
            alias[node.output[0]] = inputs[0]
            continue
        nodes.append([node.op_type, inputs, node.output[0], {a.name: _attribute(a) for a in node.attribute}])
    end = output or alias.get(model.graph.output[0].name, model.graph.output[0].name)
    nodes = _needed(nodes, end)
    if not nodes:
        raise CheckpointError(f"{source.name}: has no value {end!r}")
    used = {name for node in nodes for name in node[1]}
    weights = {name: tensor for name, tensor in weights.items() if name in used}
    graph = {
        "input": model.graph.input[0].name,
        "output": end,
        "nodes": nodes,
        "constants": {name: value for name, value in constants.items() if name in used},
        "weights": {name: list(tensor.shape) for name, tensor in weights.items()},
    }
    return graph, weights


def _needed(nodes: list[list[Any]], end: str) -> list[list[Any]]:
    wanted, kept = {end}, []
    for node in reversed(nodes):
        if node[2] in wanted:
            kept.append(node)
            wanted |= set(node[1])
    return kept[::-1]


def _attribute(attribute: Any) -> Any:
    value = importlib.import_module("onnx.helper").get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, int | float) else list(value)
