"""How does each kind of packaged file become a folder, and does the model in it still say what it should?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mllm.damage import read_safetensors
from mllm.errors import CheckpointError, UnavailableError
from mllm.install import install_hint
from mllm.modes import by_umask
from mllm.parts.part import Part

_TOLERANCE = 0.02
"""Of a mean loss in bf16, and, relative to the spread, of a picture's features."""


def convert(part: Part, file: Path, folder: Path) -> None:
    """Write the part's folder: safetensors and what is needed to open it."""
    {"gguf": _convert_gguf, "timm": _convert_timm, "onnx": _convert_onnx}[part.kind](part, file, folder)


def verify(part: Part, folder: Path) -> None:
    """Raise `CheckpointError` where the converted model says something else than the catalogue has."""
    if not part.check:
        return
    found = measure(part, folder)
    for name, value in found.items():
        wanted = float(part.check[name])
        scale = 1.0 if name == "loss" else float(part.check["std"])
        if not abs(value - wanted) <= _TOLERANCE * scale:
            raise CheckpointError(f"{part.name}: converted, it gives {name} {value:.4f} where {wanted:.4f} is expected")


@torch.inference_mode()
def measure(part: Part, folder: Path) -> dict[str, float]:
    """What `verify` compares: a language model's mean loss on a text, or mean and std of the output for a fixed picture."""
    if part.kind == "gguf":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        ids = tokenizer(part.check["text"], return_tensors="pt").input_ids
        return {"loss": float(model(ids, labels=ids).loss)}
    output = _timm_model(part, folder)(_picture(224)) if part.kind == "timm" else _graph(part, folder)(_picture(96))
    return {"mean": float(output.mean()), "std": float(output.std())}


def _convert_gguf(part: Part, file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UnavailableError(f"{part.name}: reading GGUF needs the gguf package: {install_hint('gguf')}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    try:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # before transformers kept GGUF weights packed they always became plain
        pass
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, **options)
    if not tokenizer.chat_template:
        raise CheckpointError(f"{part.name}: {file.name} has no chat template")
    model.save_pretrained(str(folder))
    by_umask(folder)
    tokenizer.save_pretrained(str(folder))


def _convert_timm(part: Part, file: Path, folder: Path) -> None:
    """timm's names onto the package's tensors, which come in the same order: kinds and shapes are compared one by one."""
    import timm

    assert part.architecture is not None
    source = torch.load(file, map_location="cpu", weights_only=True)
    target = timm.create_model(part.architecture, pretrained=False).state_dict()
    mine = [(name.rsplit(".", 1)[1], tensor.shape) for name, tensor in target.items()]
    theirs = [(name.rsplit(".", 1)[1], tensor.shape) for name, tensor in source.items()]
    if mine != theirs:
        raise CheckpointError(f"{part.name}: the tensors of {file.name} are not those of timm's {part.architecture}")
    weights = {name: tensor.contiguous() for name, tensor in zip(target, source.values(), strict=True)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    by_umask(folder)
    config = {"architecture": part.architecture, "license": part.licence.lower()}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _convert_onnx(part: Part, file: Path, folder: Path) -> None:
    from mllm.parts.onnx_graph import read_onnx

    graph, weights = read_onnx(file, part.output)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    by_umask(folder)
    (folder / "graph.json").write_text(json.dumps(graph) + "\n", encoding="utf-8")


def _picture(side: int) -> Tensor:
    """A picture that is the same everywhere: crossing waves."""
    line = torch.arange(side, dtype=torch.float64)
    waves = [torch.sin(line / (5 + k))[:, None] * torch.cos(line / (9 - k))[None] for k in range(3)]
    return torch.stack(waves)[None].float()


def _timm_model(part: Part, folder: Path) -> Any:
    import timm

    assert part.architecture is not None
    model = timm.create_model(part.architecture, pretrained=False).eval()
    model.load_state_dict(read_safetensors(folder / "model.safetensors"))
    return model


def _graph(part: Part, folder: Path) -> Any:
    from mllm.parts.graph_network import GraphNetwork

    net = GraphNetwork(json.loads((folder / "graph.json").read_text(encoding="utf-8")))
    net.load_state_dict(
        {net.keys[name]: tensor for name, tensor in read_safetensors(folder / "model.safetensors").items()}
    )
    return net.eval()
