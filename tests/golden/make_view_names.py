"""Write which weights the published checkpoints of encoders of several views hold, from their authors' own models at their published
sizes (on meta: names and shapes, no values).

As make_views.py, with omegaconf beside:

    PYTHONPATH=. python tests/golden/make_view_names.py --pi3 Pi3 --spatial-mllm Spatial-MLLM
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from mllm.encoders.weights import parameters_on_meta
from tests.golden.make_views import name_package, package

TARGET = Path(__file__).parent / "view_names.json.gz"
DA3 = {f"da3-{size}": f"da3-{size}" for size in ("base", "small", "large", "giant")}
DA3 |= {"da3-metric-large": "da3metric-large", "da3-mono-large": "da3mono-large"}
"""Preset → the package's name of it."""
PARTS = {"net": "backbone", "head": "head", "cam_enc": "cam_enc", "cam_dec": "cam_dec", "gs_head": "gs_head"}
"""The package's configs' parts that have weights → what its model calls them."""


def as_saved(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state as a file of safetensors has them: of one tensor's names the first."""
    seen: dict[int, str] = {}
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        seen.setdefault(id(value), name)
    state = model.state_dict(keep_vars=True)
    return {name: tuple(state[name].shape) for name in seen.values()}


def depth_anything_3(name: str) -> nn.Module:
    package("depth_anything_3.model", "model")
    package("depth_anything_3.utils", "utils")
    from depth_anything_3.cfg import create_object, load_config  # pyright: ignore[reportMissingImports]

    root = Path(sys.modules["depth_anything_3"].__path__[0])
    made = {}
    for part, config in load_config(str(root / f"configs/{name}.yaml")).items():
        if part in PARTS:
            made[PARTS[part]] = create_object(config)
    return nn.ModuleDict({"model": nn.ModuleDict(made)})


def pi3(checkout: Path, name: str = "Pi3") -> nn.Module:
    name_package("pi3", checkout / "pi3")
    return getattr(importlib.import_module(f"pi3.models.{name.lower()}"), name)()


def vggt(checkout: Path) -> nn.Module:
    name_package("vggt", checkout / "src/qwenvl/external/vggt")
    from vggt.models.vggt import VGGT  # pyright: ignore[reportMissingImports]

    return VGGT()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pi3", type=Path, help="default: its names are left as they are")
    parser.add_argument("--spatial-mllm", type=Path, help="likewise, VGGT's")
    options = parser.parse_args()
    made: dict[str, Callable[[], nn.Module]] = {preset: partial(depth_anything_3, name) for preset, name in DA3.items()}
    if options.pi3 is not None:
        made |= {"pi3": partial(pi3, options.pi3), "pi3x": partial(pi3, options.pi3, "Pi3X")}
    if options.spatial_mllm is not None:
        made["vggt-1b"] = partial(vggt, options.spatial_mllm)
    found: dict[str, dict[str, tuple[int, ...]]] = json.loads(gzip.decompress(TARGET.read_bytes()))
    for preset, make in made.items():
        with parameters_on_meta():
            found[preset] = as_saved(make())
        print(preset, len(found[preset]))
    with gzip.GzipFile(TARGET, "wb", mtime=0) as file:
        file.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
