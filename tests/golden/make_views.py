"""Write the golden vectors of encoders that see several views, with their authors' own modules, in fp32 on a CPU.

    pip install --no-deps depth-anything-3==0.1.1 einops addict      # Apache-2.0, in an environment of its own
    git clone https://github.com/yyfz/Pi3 && git -C Pi3 checkout 9fa3ddb     # the code BSD-3-Clause
    git clone https://github.com/diankun-wu/Spatial-MLLM && git -C Spatial-MLLM checkout 9fc4738     # has a copy of VGGT
    PYTHONPATH=. python tests/golden/make_views.py --pi3 Pi3 --spatial-mllm Spatial-MLLM

Only the models' modules are imported; the packages' other requirements are not needed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from tests.golden.fill import fill

HERE = Path(__file__).parent
SEED = 311
SIZES = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "num_heads": 2}
DA3 = {**SIZES, "depth": 6, "alt_start": 2, "qknorm_start": 2, "rope_start": 2, "cat_token": True}
ALONE = {**SIZES, "depth": 6, "alt_start": -1, "qknorm_start": -1, "rope_start": -1, "cat_token": False}
PI3 = {**SIZES, "dinov2_depth": 2, "dinov2_registers": 4, "decoder_depth": 4, "registers": 5}
HEADS = {"inner": 32, "num_heads": 2, "camera": 16}
POINTS = {
    "dim_in": 64, "features": 16, "out_channels": [8, 12, 16, 16], "intermediate_layer_idx": [0, 1, 2, 3],
    "activation": "inv_log", "conf_activation": "expp1", "output_dim": 4,
}  # fmt: skip
Read = Callable[[Any, Tensor], dict[str, Tensor]]
"""(model, pixels ``(1, S, 3, H, W)``, ImageNet-normalised) → outputs by name."""


def name_package(name: str, folder: Path) -> None:
    """Let modules below a package be imported without running its ``__init__.py``."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def package(name: str, folder: str) -> None:
    """Let modules below a part of depth_anything_3 be imported alone."""
    if "depth_anything_3" not in sys.modules:
        found = importlib.util.find_spec("depth_anything_3")
        assert found is not None and found.submodule_search_locations
        name_package("depth_anything_3", Path(next(iter(found.submodule_search_locations))))
    if name not in sys.modules:
        name_package(name, Path(sys.modules["depth_anything_3"].__path__[0]) / folder)


def depth_anything_3(ctor: dict[str, Any]) -> nn.Module:
    """The package's `DinoVisionTransformer`."""
    package("depth_anything_3.model", "model")
    from depth_anything_3.model.dinov2.vision_transformer import (  # pyright: ignore[reportMissingImports]
        DinoVisionTransformer,
    )

    return DinoVisionTransformer(**ctor)


def read_depth_anything_3(layers: list[int], model: Any, pixels: Tensor) -> dict[str, Tensor]:
    found = {}
    for layer, (tokens, camera) in zip(layers, model.get_intermediate_layers(pixels, layers)[0], strict=True):
        found |= {f"{layer + 1}": tokens, f"{layer + 1}.camera": camera}
    return found


def depth_anything_3_points() -> nn.Module:
    """The package's head for depth and its decoder of cameras on a small backbone."""
    backbone = depth_anything_3(DA3)
    from depth_anything_3.model.cam_dec import CameraDec  # pyright: ignore[reportMissingImports]
    from depth_anything_3.model.dualdpt import DualDPT  # pyright: ignore[reportMissingImports]

    head = DualDPT(64, output_dim=2, features=16, out_channels=[8, 12, 16, 16])
    return nn.ModuleDict({"backbone": backbone, "head": head, "cam_dec": CameraDec(64)})


def read_depth_anything_3_points(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    layers = model["backbone"].get_intermediate_layers(pixels, [2, 3, 4, 5])[0]
    told = model["head"](layers, *pixels.shape[3:], patch_start_idx=0)
    poses = model["cam_dec"].float()(layers[-1][1].float())  # which computes in fp32 whatever it is given
    rays = {"rays": told["ray"], "rays_confidence": told["ray_conf"]}
    return {"depth": told["depth"], "confidence": told["depth_conf"], "poses": poses, **rays}


def known_cameras() -> tuple[Tensor, list[float], tuple[int, int]]:
    """Cameras ``(5, 3, 4)`` (camera to world) that stand and look anywhere, their field of view in degrees and the (height, width) of
    frames; float64."""
    drawn = torch.from_numpy(fill("cameras", (5, 3, 4), SEED, "normal")).double()
    turns = torch.linalg.qr(drawn[:, :, :3])[0]
    turns = turns * torch.linalg.det(turns)[:, None, None]
    return torch.cat([turns, 2 * drawn[:, :, 3:]], dim=-1), [50.0, 64.0], (42, 56)


def write_cameras() -> None:
    """The package's camera encoder and what its backbone makes of five views with known cameras, beside two without."""
    import ast

    backbone = depth_anything_3(DA3)
    from depth_anything_3.model.cam_enc import CameraEnc  # pyright: ignore[reportMissingImports]
    from depth_anything_3.utils.geometry import affine_inverse  # pyright: ignore[reportMissingImports]

    # of the package's module for users, which needs all its requirements, only what it does to cameras beforehand
    api = Path(sys.modules["depth_anything_3"].__path__[0]) / "api.py"
    (normalise,) = (
        node for node in ast.walk(ast.parse(api.read_text())) if getattr(node, "name", "") == "_normalize_extrinsics"
    )
    scope: dict[str, Any] = {"torch": torch, "affine_inverse": affine_inverse}
    exec(compile(ast.Module([normalise], []), str(api), "exec"), scope)

    cameras, fov, (height, width) = known_cameras()
    square = torch.cat([cameras, torch.tensor([0.0, 0, 0, 1]).expand(5, 1, 4)], dim=1)[None].float()
    down, across = (torch.tensor(fov).deg2rad() / 2).tan().tolist()
    lens = torch.tensor([[width / 2 / across, 0, width / 2], [0, height / 2 / down, height / 2], [0, 0, 1]])
    model: Any = nn.ModuleDict({"backbone": backbone, "cam_enc": CameraEnc(dim_out=DA3["embed_dim"])})
    seen: list[Tensor] = []
    model["cam_enc"].pose_branch.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    def read(model: Any, pixels: Tensor) -> dict[str, Tensor]:
        if pixels.shape[1] != 5:
            return read_depth_anything_3([1, 3, 5], model["backbone"], pixels)
        world = scope["_normalize_extrinsics"](None, affine_inverse(square).to(pixels))
        model["cam_enc"].float()  # which is given float32 whatever it is
        tokens = model["cam_enc"](world.float(), lens.expand(1, 5, 3, 3), (height, width)).to(pixels)
        found = {"encoding": seen[-1], "token": tokens}
        layers = model["backbone"].get_intermediate_layers(pixels, [1, 3, 5], cam_token=tokens)[0]
        for layer, (patches, camera) in zip((1, 3, 5), layers, strict=True):
            found |= {f"{layer + 1}": patches, f"{layer + 1}.camera": camera}
        return found

    write(
        model, read, {"five": 5, "two": 2},
        {"case": "depth_anything_3_cameras", "paper": "Depth Anything 3 (arXiv 2511.10647)", "ctor": {"backbone": DA3, "dim_out": 32},
         "source": "PyPI depth-anything-3 0.1.1 (Apache-2.0), model/cam_enc.py:CameraEnc and api.py:_normalize_extrinsics",
         "cameras": cameras.tolist(), "fov": fov, "frame": [height, width],
         "what": "Five views whose cameras are known and two without; after blocks 2, 4 and 6.",
         "notes": "Cameras are camera to world, fov vertical and horizontal degrees; encoding [B,S,9] is what the encoder is given: place, "
                  "quaternion x, y, z, w, vertical and horizontal field of view in the first camera's world."},
    )  # fmt: skip


def noisy_rays() -> tuple[Tensor, Tensor]:
    """Rays ``(1, 3, 12, 16, 6)`` of three cameras, in the second and third off by some thousandths, a ninth of them by much, and
    confidences."""
    down, across = ((torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 - 1 for count in (12, 16))
    pixels = torch.stack([across.expand(12, 16), down[:, None].expand(12, 16), torch.ones(12, 16)], dim=-1)
    rays = []
    for view, (yaw, pitch, wide) in enumerate([(0.0, 0.0, 0.8), (0.6, -0.2, 0.7), (2.5, 0.3, 0.9)]):
        a, b = torch.tensor([yaw, pitch], dtype=torch.float64)
        turn = torch.stack([a.cos(), 0 * a, a.sin(), 0 * a, 1 + 0 * a, 0 * a, -a.sin(), 0 * a, a.cos()]).reshape(3, 3)
        tilt = torch.stack([1 + 0 * b, 0 * b, 0 * b, 0 * b, b.cos(), -b.sin(), 0 * b, b.sin(), b.cos()]).reshape(3, 3)
        seen = pixels * torch.tensor([wide, 0.75 * wide, 1.0], dtype=torch.float64) @ (turn @ tilt).T
        noise = torch.from_numpy(fill(f"noise.{view}", (12, 16, 6), SEED, "normal")).double() * 0.002 * (view > 0)
        noise[::3, ::3, :2] += 2.0 * (view > 0)
        places = torch.tensor([view, 0.5 * view, -view], dtype=torch.float64).expand(12, 16, 3)
        rays.append(torch.cat([seen, places], dim=-1) + noise)
    confidence = 1 + torch.from_numpy(fill("confidence", (1, 3, 12, 16), SEED, "uniform")).double()
    return torch.stack(rays)[None].float(), confidence.float()


def write_rays() -> None:
    """The package's cameras of those rays, and the homographies that it takes apart; both by its random guesses."""
    package("depth_anything_3.utils", "utils")
    from depth_anything_3.utils import ray_utils  # pyright: ignore[reportMissingImports]

    fits: list[Tensor] = []
    fit = ray_utils.ransac_find_homography_weighted_fast_batch
    ray_utils.ransac_find_homography_weighted_fast_batch = lambda *told, **more: (
        fits.append(fit(*told, **more)) or fits[-1]
    )
    torch.manual_seed(SEED)
    rays, confidence = noisy_rays()
    turned, focal, middle = ray_utils.get_extrinsic_from_camray(rays.clone(), confidence.clone()[..., None], 12, 16)
    torch.manual_seed(SEED + 1)
    again, *_ = ray_utils.get_extrinsic_from_camray(rays.clone(), confidence.clone()[..., None], 12, 16)
    assert (turned - again).abs().max() < 1e-6, "the guesses count"
    outputs = {
        "input.rays": rays[0], "input.confidence": confidence[0], "output.homographies": torch.cat(fits[:2]),
        "output.cameras": turned[0], "output.focal": focal[0], "output.middle": middle[0],
    }  # fmt: skip
    meta = {
        "case": "depth_anything_3_rays", "variant": "open", "seed": SEED, "paper": "Depth Anything 3 (arXiv 2511.10647)",
        "source": "PyPI depth-anything-3 0.1.1 (Apache-2.0), utils/ray_utils.py:get_extrinsic_from_camray",
        "what": "The cameras of a ray map with noise and outliers; a homography's last entry is 1.",
        "notes": "Cameras [S,4,4] (camera to world); focal length and middle of a picture from 0 to 2. Its decomposition supposes that the "
                 "axis goes through the picture's middle, as it does in the first view alone exactly.",
        "params": [], "inputs": [{"name": f"input.{n}", "stored": True} for n in ("rays", "confidence")],
        "outputs": [{"name": key, "shape": list(value.shape), "dtype": "float32"} for key, value in outputs.items() if "out" in key],
        "tolerance": {"atol": 2e-5, "rtol": 1e-5},
    }  # fmt: skip
    (HERE / "depth_anything_3_rays.json").write_text(json.dumps(meta, indent=1) + "\n")
    save_file(
        {key: value.contiguous().numpy() for key, value in outputs.items()}, HERE / "depth_anything_3_rays.safetensors"
    )


def pi3(checkout: Path) -> nn.Module:
    """The authors' `Pi3` up to its heads, at small sizes."""
    name_package("pi3", checkout / "pi3")
    from pi3.models.dinov2.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
        DinoVisionTransformer,
    )
    from pi3.models.layers.attention import FlashAttentionRope  # pyright: ignore[reportMissingImports]
    from pi3.models.layers.block import BlockRope  # pyright: ignore[reportMissingImports]
    from pi3.models.layers.pos_embed import PositionGetter, RoPE2D  # pyright: ignore[reportMissingImports]
    from pi3.models.pi3 import Pi3  # pyright: ignore[reportMissingImports]

    model: Any = Pi3.__new__(Pi3)
    nn.Module.__init__(model)
    width, heads = PI3["embed_dim"], PI3["num_heads"]
    model.encoder = DinoVisionTransformer(
        **SIZES, depth=PI3["dinov2_depth"], mlp_ratio=4, init_values=1.0, block_chunks=0,
        num_register_tokens=PI3["dinov2_registers"], interpolate_antialias=True, interpolate_offset=0.0,
    )  # fmt: skip
    del model.encoder.mask_token
    model.patch_size, model.pos_type, model.dec_embed_dim = PI3["patch_size"], "rope100", width
    model.rope, model.position_getter = RoPE2D(freq=100.0), PositionGetter()
    model.decoder = nn.ModuleList(
        BlockRope(
            dim=width, num_heads=heads, mlp_ratio=4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), init_values=0.01,
            qk_norm=True, attn_class=FlashAttentionRope, rope=model.rope,
        ) for _ in range(PI3["decoder_depth"])
    )  # fmt: skip
    model.patch_start_idx = PI3["registers"]
    model.register_token = nn.Parameter(torch.zeros(1, 1, PI3["registers"], width))
    return model


def read_pi3(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    views, height, width = pixels.shape[1], *pixels.shape[3:]
    patches = model.encoder(pixels[0], is_training=True)["x_norm_patchtokens"]
    return {"all": model.decode(patches, views, height, width)[0]}


def pi3_heads(checkout: Path) -> nn.Module:
    """The authors' `Pi3` whole, its decoders at small sizes."""
    model: Any = pi3(checkout)
    from pi3.models.layers.camera_head import CameraHead  # pyright: ignore[reportMissingImports]
    from pi3.models.layers.transformer_head import (  # pyright: ignore[reportMissingImports]
        LinearPts3d,
        TransformerDecoder,
    )

    inner, heads, camera = HEADS["inner"], HEADS["num_heads"], HEADS["camera"]
    for name, width, outputs in (("point", inner, 3), ("conf", inner, 1), ("camera", camera, None)):
        decoder = TransformerDecoder(2 * PI3["embed_dim"], width, inner, dec_num_heads=heads, rope=model.rope)
        setattr(model, f"{name}_decoder", decoder)
        head = CameraHead(width) if outputs is None else LinearPts3d(PI3["patch_size"], width, outputs)
        setattr(model, f"{name}_head", head)
    model.image_mean, model.image_std = 0.0, 1.0  # pictures are normalised already
    return model


def read_pi3_heads(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    for head in (model.point_head, model.conf_head, model.camera_head):
        head.float()  # which compute in fp32 whatever they are given
    found = model(pixels)
    return {name: found[name] for name in ("points", "local_points", "conf", "camera_poses")}


def vggt_points(checkout: Path) -> nn.Module:
    """VGGT's `DPTHead` for points at small sizes."""
    name_package("vggt", checkout / "src/qwenvl/external/vggt")
    name_package("vggt.heads", checkout / "src/qwenvl/external/vggt/heads")
    from vggt.heads.dpt_head import DPTHead  # pyright: ignore[reportMissingImports]

    return DPTHead(**POINTS)


def read_vggt_points(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    tokens = [
        torch.from_numpy(fill(f"input.layer_{k}", (1, pixels.shape[1], 14, 64), SEED, "normal")).to(pixels)
        for k in range(4)
    ]
    points, confidence = model(tokens, pixels, 2)
    return {"points": points, "confidence": confidence}


def rule(name: str, shape: tuple[int, ...]) -> str:
    if ("norm" in name and name.endswith("weight")) or name.endswith("gamma"):
        return "norm"
    return "matrix" if len(shape) > 1 else "vector"


@torch.no_grad()
def write(
    model: nn.Module,
    read: Read,
    views: dict[str, int],
    about: dict[str, Any],
    *,
    size: tuple[int, int] = (42, 56),
    named: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Fill, run and store one case. views: how many each input has; about: what its JSON says of it; size: of a view; named: the weights
    that are filled (all)."""
    model.eval()
    params = []
    for key, parameter in model.named_parameters() if named is None else named:
        kind = rule(key, tuple(parameter.shape))
        params.append({"name": key, "shape": list(parameter.shape), "rule": kind, "role": key})
        parameter.copy_(torch.from_numpy(fill(key, parameter.shape, SEED, kind)))
    exact = copy.deepcopy(model).double()
    inputs, outputs, worst = [], {}, 0.0
    for case, count in views.items():
        shape = (1, count, 3, *size)
        pixels = torch.from_numpy(fill(f"input.{case}", shape, SEED, "normal"))
        more = {"stored": False, "rule": "normal", "meaning": "[B,S,3,H,W], ImageNet-normalised"}
        inputs.append({"name": f"input.{case}", "shape": list(shape), "dtype": "float32", **more})
        fine = read(exact, pixels.double())
        for name, value in read(model, pixels).items():
            outputs[f"output.{case}.{name}"] = value.contiguous().numpy()  # safetensors would store a view's memory
            worst = max(worst, float((value - fine[name]).abs().max()))
    told = [{"name": key, "shape": list(value.shape), "dtype": "float32"} for key, value in outputs.items()]
    meta = {
        "variant": "open", "seed": SEED, "mode": "eval", **about, "params": params, "inputs": inputs, "outputs": told,
        "tolerance": {"atol": 2e-5, "rtol": 1e-5}, "fp32_vs_float64": worst,
    }  # fmt: skip
    target = HERE / f"{about['case']}.json"
    target.write_text(json.dumps(meta, indent=1) + "\n")
    save_file(outputs, str(target.with_suffix(".safetensors")))
    print(target.name, f"fp32 and float64 differ by {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pi3", type=Path, help="checkout of yyfz/Pi3; default: that case is left as it is")
    parser.add_argument("--spatial-mllm", type=Path, help="checkout of diankun-wu/Spatial-MLLM; likewise")
    options = parser.parse_args()
    checkout = options.pi3
    paper = {
        "paper": "Depth Anything 3 (arXiv 2511.10647)",
        "source": "PyPI depth-anything-3 0.1.1 (Apache-2.0), depth_anything_3/model/dinov2/vision_transformer.py:DinoVisionTransformer",
    }
    write(
        depth_anything_3(DA3), partial(read_depth_anything_3, [1, 3, 5]), {"five": 5, "two": 2},
        {"case": "depth_anything_3", **paper, "ctor": DA3,
         "what": "DINOv2 whose blocks from the third on attend inside and across views in turns; after blocks 2, 4 and 6.",
         "notes": "Of five views the reference is chosen by their class tokens before the second block, of two it is the first. "
                  "[B,S,N,2C]: after the last block inside views, then after the last of all, normalised; camera tokens [B,S,2C] are not."},
    )  # fmt: skip
    write(
        depth_anything_3(ALONE), partial(read_depth_anything_3, [2, 5]), {"two": 2},
        {"case": "depth_anything_3_alone", **paper, "ctor": ALONE,
         "what": "The backbone of the models of single pictures: no block across views, no rotary positions, no camera token.",
         "notes": "[B,S,N,C], normalised; .camera is the class token, not normalised."},
    )  # fmt: skip
    write_cameras()
    write(
        depth_anything_3_points(), read_depth_anything_3_points, {"four": 4},
        {"case": "depth_anything_3_points", "paper": paper["paper"], "ctor": {"backbone": DA3, "features": 16},
         "source": "PyPI depth-anything-3 0.1.1 (Apache-2.0), model/dualdpt.py:DualDPT and model/cam_dec.py:CameraDec",
         "what": "Depth, rays, their confidences and cameras on the backbone's layers 3 to 6.",
         "notes": "Depth [B,S,H,W]; poses [B,S,9]: place, quaternion x y z w (camera to world), vertical and horizontal field of view; "
                  "rays [B,S,8 rows,8 columns,6]: direction, place. Their four outputs share a norm, which has the first one's name."},
    )  # fmt: skip
    write_rays()
    if checkout is not None:
        write(
            pi3(checkout), read_pi3, {"three": 3, "one": 1},
            {"case": "pi3", "paper": "Pi3 (arXiv 2507.13347)", "ctor": PI3,
             "source": "yyfz/Pi3@9fa3ddb (code BSD-3-Clause), pi3/models/pi3.py:Pi3.decode after its DINOv2",
             "what": "Encoder and decoder up to the heads: blocks inside each view and across views in turns, no view before the others.",
             "notes": "[S,5+N,2C]: after the last block inside views, then after the last across; registers first, not normalised."},
        )  # fmt: skip
        write(
            pi3_heads(checkout), read_pi3_heads, {"three": 3},
            {"case": "pi3_heads", "paper": "Pi3 (arXiv 2507.13347)", "ctor": {**PI3, **HEADS},
             "source": "yyfz/Pi3@9fa3ddb (code BSD-3-Clause), pi3/models/pi3.py:Pi3.forward",
             "what": "Points, points before the cameras, confidence and cameras.",
             "notes": "[B,S,H,W,3], the same, [B,S,H,W,1] before its sigmoid, [B,S,4,4] (camera to world)."},
        )  # fmt: skip
    if options.spatial_mllm is not None:
        write(
            vggt_points(options.spatial_mllm), read_vggt_points, {"two": 2},
            {"case": "vggt_points", "paper": "VGGT (arXiv 2503.11651)", "ctor": POINTS,
             "source": "vendored copy of facebookresearch/vggt in diankun-wu/Spatial-MLLM@9fc4738 (heads/dpt_head.py)",
             "what": "The point head: DPT over four layers of patches, points by the inverse of a signed logarithm, confidence from 1 on.",
             "notes": "Layers input.layer_0 to _3 [B,S,2+12,64] are drawn like the pixels and start with two special tokens, skipped. The "
                      " residual units change what they are given in place: what they add to is what is left of it above 0."},
        )  # fmt: skip


if __name__ == "__main__":
    main()
