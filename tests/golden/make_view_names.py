"""Write which weights the published checkpoints of encoders of several views hold, from their authors' own models at their published
sizes (on meta: names and shapes, no values).

As make_views.py, with omegaconf beside:

    PYTHONPATH=. python tests/golden/make_view_names.py --pi3 Pi3 --spatial-mllm Spatial-MLLM
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path

from torch import nn

from mllm.encoders.weights import parameters_on_meta
from tests.golden.make_views import name_package, package

TARGET = Path(__file__).parent / "view_names.json.gz"


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
        if part in ("net", "head", "cam_enc", "cam_dec"):
            made["backbone" if part == "net" else part] = create_object(config)
    return nn.ModuleDict({"model": nn.ModuleDict(made)})


def pi3(checkout: Path) -> nn.Module:
    name_package("pi3", checkout / "pi3")
    from pi3.models.pi3 import Pi3  # pyright: ignore[reportMissingImports]

    return Pi3()


def vggt(checkout: Path) -> nn.Module:
    name_package("vggt", checkout / "src/qwenvl/external/vggt")
    from vggt.models.vggt import VGGT  # pyright: ignore[reportMissingImports]

    return VGGT()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pi3", type=Path, required=True)
    parser.add_argument("--spatial-mllm", type=Path, required=True)
    options = parser.parse_args()
    made = {name: lambda name=name: depth_anything_3(name) for name in ("da3-base", "da3-small", "da3-large")}
    made |= {"pi3": lambda: pi3(options.pi3), "vggt-1b": lambda: vggt(options.spatial_mllm)}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for preset, make in made.items():
        with parameters_on_meta():
            found[preset] = as_saved(make())
        print(preset, len(found[preset]))
    with gzip.GzipFile(TARGET, "wb", mtime=0) as file:
        file.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
