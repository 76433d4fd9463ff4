"""Write the golden vectors of MapAnything, and which weights its published checkpoints hold, with its authors' own modules, in fp32 on a
CPU.

    pip install --no-deps uniception==0.1.7 jaxtyping wadler-lindig einops minio omegaconf     # BSD-3-Clause, in an environment of its own
    git clone https://github.com/facebookresearch/map-anything && git -C map-anything checkout f7ebafb     # the code Apache-2.0
    git clone https://github.com/facebookresearch/dinov2 && git -C dinov2 checkout b8931f7                 # the code Apache-2.0
    PYTHONPATH=. python tests/golden/make_mapanything.py --mapanything map-anything --dinov2 dinov2

Only the models' modules are imported; the packages' other requirements are not needed. DINOv2's code stands in for what `torch.hub` would
download; the models' sizes are those of the checkout's configs/model.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.encoders.weights import parameters_on_meta
from tests.golden.make_view_names import TARGET, as_saved
from tests.golden.make_views import name_package, write

SIZES = {"dinov2_width": 32, "dinov2_depth": 2, "dinov2_heads": 2, "depth": 4, "img_size": 56, "patch_size": 14}
CASES = {1: {**SIZES, "width": 16, "num_heads": 2}, 2: {**SIZES, "width": 32, "num_heads": 2}}
DENSE = {"layer_dims": [8, 12, 16, 16], "feature_dim": 16}
GIVEN = ("ray_dirs", "depth", "depth_scale", "cam_rot", "cam_trans", "cam_trans_scale")
"""What known geometry is read with, whose weights nothing of pictures alone meets."""


def modules(mapanything: Path, dinov2: Path) -> Any:
    """The authors' module that defines the model."""
    sys.path.insert(0, str(dinov2))
    for name in ("", ".models", ".utils", ".models.mapanything"):
        name_package(f"mapanything{name}", mapanything / "mapanything" / name.strip(".").replace(".", "/"))
    found = importlib.util.find_spec("uniception")
    assert found is not None and found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations)))
    name_package("uniception", folder)
    name_package("uniception.models", folder / "models")
    return importlib.import_module("mapanything.models.mapanything.model")


def configs(mapanything: Path, release: int) -> dict[str, Any]:
    """What the checkout's configs give the model, as hydra would compose them."""
    from omegaconf import OmegaConf  # pyright: ignore[reportMissingImports]

    OmegaConf.register_new_resolver("special_float", float, replace=True)
    root = mapanything / "configs/model"

    def read(path: str) -> Any:
        return OmegaConf.load(root / f"{path}.yaml")

    main = read("mapanything_v1" if release == 1 else "mapanything")
    parts = {key: value for entry in main.defaults if not isinstance(entry, str) for key, value in entry.items()}
    head = read(f"pred_head/{parts['pred_head']}")
    head["adaptor_config"] = read(f"pred_head/adaptor_config/{head.pop('defaults')[0].adaptor_config}")
    task = OmegaConf.merge(
        read("task/default"), {k: v for k, v in read(f"task/{parts['task']}").items() if k != "defaults"}
    )
    whole = OmegaConf.create({"model": {
        "encoder": read(f"encoder/{parts['encoder']}"), "info_sharing": read(f"info_sharing/{parts['info_sharing']}"),
        "pred_head": head, "task": task, "model_config": main.model_config,
    }})  # fmt: skip
    return OmegaConf.to_container(whole.model.model_config, resolve=True)  # type: ignore[return-value]


def build(module: Any, told: dict[str, Any], small: dict[str, Any] | None) -> Any:
    """The authors' model without published weights, at its published sizes or small."""
    backbones = importlib.import_module("dinov2.hub.backbones")
    make, factory = backbones._make_dinov2_model, module.encoder_factory
    if small is not None:
        told["info_sharing_config"]["module_args"] |= {
            "dim": small["width"], "num_heads": small["num_heads"], "depth": small["depth"], "indices": [1, 2]
        }  # fmt: skip
        told["pred_head_config"]["feature_head"] |= DENSE
        told["encoder_config"].pop("keep_first_n_layers", None)
        for key, value in told["geometric_input_config"].items():
            if key.endswith("_encoder_config"):
                value["intermediate_dims"] = [8, 8]

    def hub(_: str, name: str, **rest: Any) -> nn.Module:
        if small is None:
            return getattr(backbones, name)(pretrained=False)
        published = make(
            arch_name="vit_small", pretrained=False, img_size=small["img_size"],
            **({"ffn_layer": "swiglufused"} if "vitg" in name else {}),
        )  # fmt: skip
        kind = type(published)
        return kind(
            img_size=small["img_size"], patch_size=small["patch_size"], embed_dim=small["dinov2_width"], depth=small["dinov2_depth"],
            num_heads=small["dinov2_heads"], mlp_ratio=4, init_values=1.0, block_chunks=0, interpolate_antialias=False,
            interpolate_offset=0.1, ffn_layer="swiglufused" if "vitg" in name else "mlp",
        )  # fmt: skip

    def sized(**config: Any) -> Any:
        encoder = factory(**config)
        if small is not None and config["encoder_str"] == "dinov2":
            encoder.enc_embed_dim = small["dinov2_width"]
        return encoder

    torch.hub.load = hub
    module.encoder_factory = sized
    try:
        return module.MapAnything(**told)
    finally:
        module.encoder_factory = factory


def named_as_saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights that pictures alone meet, by the names that a file of safetensors keeps."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in as_saved(model):
        if name in parameters and not name.startswith(tuple(f"{one}_encoder." for one in GIVEN)):
            yield name, parameters[name]


def read(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """What the model says of views."""
    seen: list[Any] = []
    hook = model.info_sharing.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    before = torch.get_default_dtype()
    torch.set_default_dtype(pixels.dtype)  # in which it makes cameras' matrices
    try:
        found = model(
            [{"img": view, "data_norm_type": ["dinov2"]} for view in pixels.split(1, dim=1) for view in [view[:, 0]]]
        )
    finally:
        torch.set_default_dtype(before)
        hook.remove()
    kept = {"pts3d": "points", "depth_along_ray": "depth", "conf": "confidence", "non_ambiguous_mask_logits": "mask",
            "cam_trans": "places", "cam_quats": "quaternions", "metric_scaling_factor": "scale"}  # fmt: skip
    outputs = {name: torch.stack([view[key] for view in found], dim=1) for key, name in kept.items()}
    outputs["patches"] = torch.stack([view.flatten(2).mT for view in seen[0].features], dim=1)
    outputs["scale_token"] = seen[0].additional_token_features.mT
    if seen[0].additional_token_features_per_view is not None:
        outputs["class_tokens"] = torch.stack([view.mT for view in seen[0].additional_token_features_per_view], dim=1)
    outputs["view_pos_table"] = model.info_sharing.view_pos_table
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mapanything", type=Path, required=True, help="checkout of facebookresearch/map-anything")
    parser.add_argument("--dinov2", type=Path, required=True, help="checkout of facebookresearch/dinov2")
    options = parser.parse_args()
    module = modules(options.mapanything, options.dinov2)
    for release, small in CASES.items():
        model = build(module, configs(options.mapanything, release), small)
        write(
            model, read, {"three": 3} if release == 2 else {"two": 2},
            {"case": f"mapanything_{release}", "paper": "MapAnything (arXiv 2509.13414)", "ctor": {"release": release, **small, **DENSE},
             "source": "facebookresearch/map-anything@f7ebafb (code Apache-2.0), models/mapanything/model.py:MapAnything.forward, on "
                       "PyPI uniception 0.1.7 (BSD-3-Clause)",
             "what": "The whole model on pictures alone: release 1 is of September 2025 (v1), 2 the later one.",
             "notes": "[B,S,...]; patches and tokens are the last layer's, normalised. Points and places are multiplied by the scale, "
                      "depth too; quaternions x y z w, camera to world. view_pos_table marks the first view."},
            size=(28, 42), named=list(named_as_saved(model)),
        )  # fmt: skip
    names = json.loads(gzip.decompress(TARGET.read_bytes()))
    for preset, release in (("mapanything-v1", 1), ("mapanything", 2)):
        with parameters_on_meta():
            names[preset] = as_saved(build(module, configs(options.mapanything, release), None))
        print(preset, len(names[preset]))
    with gzip.GzipFile(TARGET, "wb", mtime=0) as file:
        file.write(json.dumps(names).encode())


if __name__ == "__main__":
    main()
