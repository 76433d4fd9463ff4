"""Write the golden vectors ``depth_anything_3*`` with the published package's own backbone (Apache-2.0), in fp32 on a CPU.

    pip install --no-deps depth-anything-3==0.1.1 einops      # in an environment of its own
    PYTHONPATH=. python tests/golden/make_depth_anything_3.py

Only the backbone's modules are imported; the package's other requirements are not needed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.numpy import save_file

from tests.golden.fill import fill

HERE = Path(__file__).parent
SIZES = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 6, "num_heads": 2}
JOINED = {**SIZES, "alt_start": 2, "qknorm_start": 2, "rope_start": 2, "cat_token": True}
ALONE = {**SIZES, "alt_start": -1, "qknorm_start": -1, "rope_start": -1, "cat_token": False}
SEED = 311


def backbone():
    """The package's `DinoVisionTransformer`, without running its ``model/__init__.py``."""
    found = importlib.util.find_spec("depth_anything_3") if "depth_anything_3" not in sys.modules else None
    places = found.submodule_search_locations if found is not None else []
    for root in map(Path, places or []):
        _name_packages(root)
    from depth_anything_3.model.dinov2.vision_transformer import (  # pyright: ignore[reportMissingImports]
        DinoVisionTransformer,
    )

    return DinoVisionTransformer


def _name_packages(root: Path) -> None:
    for name, folder in (("depth_anything_3", root), ("depth_anything_3.model", root / "model")):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module


def rule(name: str, shape: tuple[int, ...]) -> str:
    if ("norm" in name and name.endswith("weight")) or name.endswith("gamma"):
        return "norm"
    return "matrix" if len(shape) > 1 else "vector"


def write(name: str, ctor: dict, views: dict[str, int], layers: list[int], what: str, notes: str) -> None:
    model = backbone()(**ctor).eval()
    params = []
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            kind = rule(key, tuple(parameter.shape))
            params.append({"name": key, "shape": list(parameter.shape), "rule": kind, "role": key})
            parameter.copy_(torch.from_numpy(fill(key, parameter.shape, SEED, kind)))
    inputs, outputs, worst = {}, {}, 0.0
    for case, count in views.items():
        pixels = inputs[f"input.{case}"] = fill(f"input.{case}", (1, count, 3, 42, 56), SEED, "normal")
        with torch.no_grad():
            found = model.get_intermediate_layers(torch.from_numpy(pixels), layers)[0]
            exact = model.double().get_intermediate_layers(torch.from_numpy(pixels).double(), layers)[0]
            model.float()
        for layer, (tokens, camera), (fine, _) in zip(layers, found, exact, strict=True):
            outputs[f"output.{case}.{layer + 1}"] = tokens.contiguous().numpy()
            outputs[f"output.{case}.{layer + 1}.camera"] = camera.contiguous().numpy()
            worst = max(worst, float((tokens - fine).abs().max()))
    about = {"input": "[B,S,3,H,W], ImageNet-normalised", "output": "[B,S,N,D] patches, or [B,S,D] camera tokens"}
    told = {
        kind: [
            {"name": key, "shape": list(value.shape), "dtype": str(value.dtype), "meaning": about[kind[:-1]], **more}
            for key, value in values.items()
        ]
        for kind, values, more in (("inputs", inputs, {"stored": False, "rule": "normal"}), ("outputs", outputs, {}))
    }
    meta = {
        "case": name, "variant": "open", "seed": SEED, "paper": "Depth Anything 3 (arXiv 2511.10647)", "what": what,
        "source": "PyPI depth-anything-3 0.1.1 (Apache-2.0), depth_anything_3/model/dinov2/vision_transformer.py:DinoVisionTransformer",
        "ctor": ctor, "mode": "eval", "params": params, **told, "tolerance": {"atol": 2e-5, "rtol": 1e-5},
        "fp32_vs_float64": worst, "notes": notes,
    }  # fmt: skip
    (HERE / f"{name}.json").write_text(json.dumps(meta, indent=1) + "\n")
    save_file(outputs, str(HERE / f"{name}.safetensors"))
    print(name, f"fp32 and float64 differ by {worst:.1e}")


if __name__ == "__main__":
    write(
        "depth_anything_3", JOINED, {"five": 5, "two": 2}, [1, 3, 5],
        "Backbone: DINOv2 whose blocks from the third on attend inside and across views in turns; output after blocks 2, 4 and 6.",
        "Of five views the reference is chosen by their class tokens before the second block; of two it is the first. Tokens are the last "
        "block inside the views, then the last of all, normalised; camera tokens are not normalised.",
    )  # fmt: skip
    write(
        "depth_anything_3_alone", ALONE, {"two": 2}, [2, 5],
        "Backbone of the models of single pictures: no block across views, no rotary positions, no camera token.",
        "Tokens are normalised.",
    )  # fmt: skip
