"""How is the module that the authors of a research backbone published built at the size of a catalogue's entry, and run up to the
features that our encoder hands out?

`encoders_speed.py --authors DIR` times it beside ours. DIR is yours: none of the authors' code is part of this project. It holds a
folder for each family, by the catalogue's type, with the files of the authors' repository under their own names (``biformer/models``,
``biformer/ops``, ``crossformer/models``, ``vssd/mamba2.py`` …), and ``shims`` with whatever their imports need besides (einops; empty
modules in place of CUDA extensions that the published configuration never calls). A family whose folder or import is missing is told
in the table by the error.

Only what ours computes as well is run and counted: heads for classes and decoders are left out, by stopping where they would start.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Any]

WITHOUT_CODE = {
    "dependencyvit": "no public code",
    "vir": "no public code",
    "dualtokenvit": "no public code",
    "evitpose": "no public code",
    "unitranspose": "no public code",
    "gldmnet": "no public code",
    "dbsam": "their repository lacks the adapter's modules",
    "falcon": "written for transformers 4.3x",
    "lookupvit": "no authors' code",
}
"""Types whose authors' module cannot be run at all."""
LOOPS = {"s4d"}
"""Types whose authors loop in Python where ours does not: over the experts of a block."""


class Reached(Exception):
    """The module that a run should stop at was called."""


def stopping_at(module: nn.Module, name: str, call: Run | None = None) -> Run:
    """Runs `module` until the submodule `name` would be called, whose input it hands out."""

    def stop(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise Reached(*inputs)

    module.get_submodule(name).register_forward_pre_hook(stop)

    def run(pixels: Tensor) -> Any:
        try:
            return (call or module)(pixels)
        except Reached as reached:
            return reached.args[0]

    return run


@dataclass(frozen=True)
class Theirs:
    """run: pixels to features. others: names of submodules and parameters that ours does not have, which are not counted. differs:
    why the counts are not the same all the same."""

    module: nn.Module
    run: Run
    others: tuple[str, ...] = ("head",)
    differs: str = ""

    def millions(self) -> float:
        left_out = tuple(f"{name}." for name in self.others)
        counted = (
            p.numel()
            for name, p in self.module.named_parameters()
            if name not in self.others and not name.startswith(left_out)
        )
        return sum(counted) / 1e6


def _load(folder: Path, module: str) -> Any:
    """A module of the authors' folder. Their older timm names are given to a newer timm that has dropped them."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.name} in {folder.parent}")
    for path in (folder, folder.parent / "shims"):
        if str(path) not in sys.path:
            sys.path.append(str(path)) if path.name == "shims" else sys.path.insert(0, str(path))
    for old, new in {"layers": "timm.layers", "registry": "timm.models", "helpers": "timm.models"}.items():
        try:
            importlib.import_module(f"timm.models.{old}")
        except ImportError:
            sys.modules[f"timm.models.{old}"] = importlib.import_module(new)
    return importlib.import_module(module)


def _package(name: str, folder: Path) -> None:
    """A package of that folder whose own ``__init__`` is not run."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _old_timm() -> None:
    """timm's blocks of today take other names, and in another order, than those of 2021 to 2023 that authors inherit from."""
    from timm.models import vision_transformer

    block, attention = vision_transformer.Block, vision_transformer.Attention

    class OldBlock(block):  # type: ignore[misc, valid-type]
        def __init__(self, *values: Any, drop: float = 0.0, **options: Any) -> None:
            options.pop("qk_scale", None)
            super().__init__(*values, proj_drop=drop, **options)

    class OldAttention(attention):  # type: ignore[misc, valid-type]
        def __init__(
            self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_norm: bool = False, attn_drop: float = 0.0
        ):
            super().__init__(dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_norm=bool(qk_norm), attn_drop=attn_drop)

    vision_transformer.Block, vision_transformer.Attention = OldBlock, OldAttention


def _biformer(folder: Path, config: Any) -> Theirs:
    sizes: dict[str, Any] = {
        "depth": list(config.depths),
        "embed_dim": list(config.widths),
        "mlp_ratios": [config.mlp_ratio] * 4,
        "num_classes": 0,
        "head_dim": config.head_width,
    }
    if config.variant == "biformer":
        options = {"kv_downsample_mode": "identity", "kv_per_wins": [-1] * 4, "qk_dims": list(config.widths)}
        module = _load(folder, "models.biformer").BiFormer(
            **sizes, **options, n_win=config.num_regions, topks=[*config.top_k, -2]
        )
    else:
        module = _load(folder, "models.biformer_stl").BiFormerSTL(
            **sizes,
            norm_layer=nn.BatchNorm2d,
            n_wins=(config.num_regions,) * 4,
            topks=(*config.top_k, -2),
            side_dwconv=5,
        )
    return Theirs(module, module.forward_features)


def _crossformer(folder: Path, config: Any) -> Theirs:
    module = _load(folder, "models.crossformer").CrossFormer(
        img_size=config.info.image.height, patch_size=[4, 8, 16, 32], num_classes=0, embed_dim=config.width,
        depths=list(config.depths), num_heads=list(config.num_heads), group_size=list(config.group_size),
        crs_interval=list(config.interval), mlp_ratio=[config.mlp_ratio] * 4, merge_size=[[2, 4]] * 3, use_acl=config.cooling,
    )  # fmt: skip
    return Theirs(module, module.forward_features)


def _vssd(folder: Path, config: Any) -> Theirs:
    module = _load(folder, "mamba2").VMAMBA2(
        img_size=config.info.image.height, num_classes=0, embed_dim=config.width, depths=list(config.depths),
        num_heads=list(config.num_heads), mlp_ratio=config.mlp_ratio, ssd_expansion=config.expansion, d_state=config.state,
        linear_attn_duality=True, ssd_positve_dA=True, attn_types=["mamba2", "mamba2", "mamba2", "standard"],
    )  # fmt: skip
    return Theirs(module, module.forward_features)


def _channelvit(folder: Path, config: Any) -> Theirs:
    module = _load(folder, "channelvit.backbone.hcs_channel_vit").hcs_channelvit_small(
        patch_size=config.patch_size, in_chans=config.num_channels, img_size=[config.trained_size], num_classes=0
    )

    def run(pixels: Tensor) -> Any:
        channels = torch.arange(pixels.shape[1], device=pixels.device).expand(len(pixels), -1)
        return module(pixels, {"channels": channels})

    return Theirs(module, run)


def _duoformer(folder: Path, config: Any) -> Theirs:
    """The published file imports siblings from nowhere and passes two arguments that its transformer does not take: both are mended.
    Run up to the attention across regions, which ours leaves out by default."""
    _old_timm()
    _package("models", folder / "models")
    for name in (
        "multi_vision_transformer",
        "multiscale_attn",
        "projection_head",
        "scale_attention",
        "backbone",
        "resnet50ssl",
    ):
        sys.modules[name] = _load(folder, f"models.{name}")
    file = _load(folder, "models.model_wo_extra_params")
    transformer = file.MultiscaleFormer
    file.MultiscaleFormer = lambda scale_token, patch_attn, **options: transformer(**options)
    import torchvision

    for name in ("resnet18", "resnet50"):
        build = getattr(torchvision.models, name)
        setattr(file.models, name, lambda *_, build=build, **__: build(weights=None))
    module = file.MyModel_no_extra_params(
        depth=config.depth, embed_dim=config.width, num_heads=config.num_heads, num_classes=1, num_layers=config.scales,
        proj_dim=config.width, mlp_ratio=config.mlp_ratio, backbone={"resnet18": "r18", "resnet50": "r50"}[config.cnn],
        freeze_backbone=False, scale_token="random",
    )  # fmt: skip
    behind = ("blocks", "cls_token", "pos_embed", "fc_norm", "head")
    return Theirs(
        module,
        stopping_at(module, "vision_transformer.blocks.0"),
        tuple(f"vision_transformer.{name}" for name in behind),
    )


def _crossvit(folder: Path, config: Any) -> Theirs:
    _old_timm()
    module = _load(folder, "models.crossvit").VisionTransformer(
        img_size=list(config.branch_sizes), patch_size=list(config.patch_sizes), num_classes=0, embed_dim=list(config.widths),
        depth=[list(stage) for stage in config.stages], num_heads=list(config.num_heads), mlp_ratio=[*config.mlp_ratios, 1],
        qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), multi_conv=config.conv_stem,
    )  # fmt: skip
    return Theirs(module, module.forward_features, differs="the class tokens' last exchange")


def _to_the_weights_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])


def _unit(folder: Path, config: Any) -> Theirs:
    file = _load(folder, "unit.hf_model")
    from timm.models import create_model

    name = {32: "vit_huge_patch14_224", 50: "vit_huge_patch14_224_1B"}[config.depth]
    vit = create_model(name, pretrained=False, num_classes=0, weight_init="skip")
    module = file.UNITModelEncoder(vit, config.cpe_max_size, config.num_cls_tokens, config.register_multiple)
    module.input_conditioner = nn.Identity()  # scales pixels; ours gets them scaled
    for part in (vit.patch_generator.embedder, vit.blocks):  # in front of them the authors' code goes to fp32
        part.register_forward_pre_hook(_to_the_weights_dtype)
    return Theirs(module, module)


def _dynperceiver(folder: Path, config: Any) -> Theirs:
    """Run up to the classifiers of the last latents: what ours hands out."""
    family = next(part for part in ("resnet", "regnet", "mobilenet_v3") if config.cnn.startswith(part))
    width = {1.0: "", 0.375: "_0375", 0.75: "_0x75" if family == "mobilenet_v3" else "_075"}[config.cnn_width]
    file = _load(folder, f"models.dyn_perceiver_{family}")
    module = file.DynPerceiver(
        cnn_arch=f"{config.cnn}{width}", num_latents=config.num_latents, num_SA_heads=list(config.num_heads),
        SA_widening_factor=int(config.mlp_ratio), spatial_reduction=True, depth_factor=list(config.depth_factor),
    )  # fmt: skip
    heads = [name for name, _ in module.named_children() if "classifier" in name or name.startswith(("isc", "last_"))]
    last = {"resnet": ["cnn_body_stage4"], "regnet": ["cnn_body.block4"]}.get(
        family, ["cnn_body_stage4", "cnn_body_last_conv1x1"]
    )
    return Theirs(module, stopping_at(module, "isc3"), (*heads, *last, "cnn_head_before_cls"))


def _snnet(folder: Path, config: Any) -> Theirs:
    models, stitching = _load(folder, "models_v2"), _load(folder, "snnet")
    anchors = [
        models.vit_models(
            img_size=config.trained_size, patch_size=config.patch_size, embed_dim=width, depth=depth, num_heads=heads,
            mlp_ratio=config.mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), num_classes=0,
            block_layers=models.Layer_scale_init_Block,
        )
        for width, depth, heads in zip(config.widths, config.depths, config.num_heads)
    ]  # fmt: skip
    module = stitching.SNNetv2(anchors, lora_r=config.rank)
    module.reset_stitch_id(1)  # the larger model alone, as ours by default
    return Theirs(module, module)


def _s4d(folder: Path, config: Any) -> Theirs:
    experts = {
        "type": "moe_adapters",
        "layers": list(range(config.first_expert_block, config.depth)),
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "capacity_factor": 1.0,
    }
    file = _load(folder, "videomae")
    module = file.vitmoe_base_patch16_160(all_frames=config.frames, moe=experts)

    def run(pixels: Tensor) -> Any:
        return module.forward_features(pixels[:, :, None].expand(-1, -1, config.frames, -1, -1))

    return Theirs(module, run, differs="no bias of keys")


def _paratranscnn(folder: Path, config: Any) -> Theirs:
    import torchvision

    build = torchvision.models.resnet34
    torchvision.models.resnet34 = lambda weights: build(weights=None)
    module = _load(folder, "model.ParaTransCNN").ParaTransCNN(
        heads=config.num_heads, dim=config.width, depth=config.depths
    )
    decoder = ("decoder1", "decoder2", "decoder3", "up3_1", "up2_1", "up1_1", "out")
    return Theirs(module, stopping_at(module, "decoder1"), decoder)


def _samunet(folder: Path, config: Any) -> Theirs:
    """Without the bridges to the decoder, and without the authors' scaling of pixels, which ours gets done."""
    file = _load(folder, "sam_unet.models.sam_unet_model")
    sam = _load(folder, "sam_unet.models.segment_anything.build_sam").sam_model_registry["vit_b_256"](None)
    module = file.SAM_UNET(34, sam)
    module.adapters_bridge = nn.ModuleList(nn.Identity() for _ in range(3))
    file.preprocess = lambda image, **_scales: image
    run = stopping_at(
        module, "embedding_encoder", lambda pixels: module.train_forward([{"image": image} for image in pixels])
    )
    return Theirs(module, run, ("prompt_encoder", "mask_decoder", "embedding_encoder"), "positions of 256 px")


def _ddrnet(folder: Path, config: Any) -> Theirs:
    name = "DDRNet_39" if config.exchanges == 3 else "DDRNet_23"
    file = _load(folder / "segmentation", name)
    module = file.DualResNet(
        file.BasicBlock, list(config.depths), planes=config.planes, spp_planes=config.pooled_planes, augment=False
    )
    return Theirs(module, stopping_at(module, "final_layer"), ("final_layer",))


def _uni4eye(folder: Path, config: Any) -> Theirs:
    """Of Uni4Eye++, the authors' second paper. Their patch embedding is a file to copy into timm."""
    from timm.models import vision_transformer

    numpy = importlib.import_module("numpy")
    numpy.float = float  # a name of old numpy
    if not hasattr(vision_transformer, "PatchEmbed23D"):
        _package("uni4eye_layers", folder)
        sys.modules["uni4eye_layers.helpers"] = importlib.import_module("timm.layers")
        vision_transformer.PatchEmbed23D = importlib.import_module("uni4eye_layers.PatchEmbed23D").PatchEmbed23D
    module = _load(folder, "models_mymae23D").mae_vit_base_patch16_dec512d8b(in_chans=3)
    heads = [
        name for name, _ in [*module.named_children(), *module.named_parameters(recurse=False)] if "decoder" in name
    ]
    return Theirs(
        module,
        lambda pixels: module.forward_encoder(pixels, 0.0),
        (*heads, "mlp", "GAP", "controller", "mask_token"),
        "deeper patches of volumes",
    )


BUILDERS: dict[str, Callable[[Path, Any], Theirs]] = {
    "biformer": _biformer,
    "crossformer": _crossformer,
    "vssd": _vssd,
    "channelvit": _channelvit,
    "duoformer": _duoformer,
    "crossvit": _crossvit,
    "unit": _unit,
    "dynperceiver": _dynperceiver,
    "snnet": _snnet,
    "s4d": _s4d,
    "paratranscnn": _paratranscnn,
    "samunet": _samunet,
    "ddrnet": _ddrnet,
    "uni4eye": _uni4eye,
}


def build(root: Path, config: Any) -> Theirs:
    """The authors' module of an encoder's config, on the current default device.

    Raises:
        Whatever the import or the constructor raises; LookupError where there is no code at all.
    """
    if config.type in WITHOUT_CODE:
        raise LookupError(WITHOUT_CODE[config.type])
    return BUILDERS[config.type](root / config.type, config)
