"""Which networks and schedulers of `diffusers` does a diffusion decoder take, and does what it asks of them fit?"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.damage import read_json, read_safetensors
from mllm.errors import CheckpointError, ConfigError, UnavailableError, did_you_mean
from mllm.install import install_hint
from mllm.visual_tokenizers.diffusion.config import DiffusionDecoderConfig

WHERE = "decoder"
NETWORKS = {
    "unet": "UNet2DModel",
    "unet_condition": "UNet2DConditionModel",
    "dit": "DiTTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
}
_OURS = ("in_channels", "out_channels", "sample_size", "num_embeds_ada_norm", "class_embed_type", "num_class_embeds")
_FOLLOWS = {
    "flow_matching": ("num_train_timesteps", "invert_sigmas", "use_dynamic_shifting"),
    "epsilon": ("prediction_type",),
}
"""Arguments of schedulers that would give the network another clock or target than it was trained with."""
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def diffusers_class(name: str) -> Any:
    """A class of `diffusers`. Raises `UnavailableError` where that is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UnavailableError(f"a diffusion decoder needs diffusers: {install_hint('diffusion')}") from error
    return getattr(diffusers, name)


def with_saved_settings(config: DiffusionDecoderConfig) -> DiffusionDecoderConfig:
    """The config with the arguments of saved networks written out where it gives none, so that it needs their folders no more. Raises
    `CheckpointError` for a folder of something else."""
    changes: dict[str, Any] = {}
    if config.source is not None and not config.settings:
        found = saved_settings(config.source, diffusers_class(NETWORKS[config.network]), f"{WHERE}.source")
        changes["settings"] = {name: value for name, value in found.items() if name not in _OURS}
    beside = config.autoencoder
    if beside is not None and beside.source is not None and not beside.settings:
        found = saved_settings(beside.source, diffusers_class("AutoencoderKL"), f"{WHERE}.autoencoder.source")
        changes["autoencoder"] = beside.model_copy(update={"settings": found})
    return config.model_copy(update=changes)


def build_network(config: DiffusionDecoderConfig, *, channels: tuple[int, int], side: int) -> nn.Module:
    """The denoiser, with initial weights.

    Args:
        config: says which, with which arguments.
        channels: of its input (what is denoised and the conditions) and of its output.
        side: rows and columns of its input.

    Raises:
        ConfigError: for arguments that the class does not have or refuses, and an input that it cannot halve or cut into patches.
    """
    cls, where = diffusers_class(NETWORKS[config.network]), f"{WHERE}.settings"
    settings = _arguments(config, cls, where)
    _check_side(config, settings, cls, side)
    ours: dict[str, Any] = {"in_channels": channels[0], "out_channels": channels[1], "sample_size": side}
    if config.network == "dit":
        ours["num_embeds_ada_norm"] = 1  # its only class stands for "no class"
    return _built(cls, {**settings, **ours}, where)


def _arguments(config: DiffusionDecoderConfig, cls: Any, where: str) -> dict[str, Any]:
    settings = dict(config.settings)
    known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *_OURS)]
    for name in settings:
        if name in _OURS:
            raise ConfigError(f"{where}.{name}: follows from the tokenizer, space and conditions; leave it out")
        if name not in known:
            raise ConfigError(
                f"{where}.{name}: diffusers' {cls.__name__} has no such argument{did_you_mean(name, known)}"
            )
    return settings


def _check_side(config: DiffusionDecoderConfig, settings: dict[str, Any], cls: Any, side: int) -> None:
    what = "latent" if config.space == "latent" else "picture"

    def argument(name: str) -> Any:
        return settings.get(name, inspect.signature(cls.__init__).parameters[name].default)

    if config.network in ("dit", "sd3"):
        patch = argument("patch_size")
        if side % patch:
            raise ConfigError(f"{WHERE}.settings.patch_size: {patch} does not divide the {side} × {side} {what}")
        if config.network == "sd3" and side // patch > argument("pos_embed_max_size"):
            raise ConfigError(
                f"{WHERE}.settings.pos_embed_max_size: {argument('pos_embed_max_size')} positions a side do not reach over the "
                f"{side // patch} × {side // patch} patches of the {what}"
            )
        return
    levels = len(argument("block_out_channels"))
    if side % 2 ** (levels - 1):
        most = next(n for n in range(levels - 1, -1, -1) if side % 2**n == 0) + 1
        raise ConfigError(
            f"{WHERE}.settings.block_out_channels: {levels} levels halve the {side} × {side} {what} {levels - 1} times, which does not "
            f"come out even; give at most {most}"
        )


def build_autoencoder(config: DiffusionDecoderConfig, image_side: int) -> Any:
    """The autoencoder of ``space: latent``, with initial weights. Raises `ConfigError` when its latents do not fit pictures of
    that side."""
    assert config.autoencoder is not None
    cls, where, settings = diffusers_class("AutoencoderKL"), f"{WHERE}.autoencoder", dict(config.autoencoder.settings)
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in settings:
        if name not in known:
            raise ConfigError(f"{where}.settings.{name}: AutoencoderKL has no such argument{did_you_mean(name, known)}")
    if settings.get("latents_mean") or settings.get("latents_std"):
        raise ConfigError(
            f"{where}.settings: latents_mean and latents_std are not supported; scaling_factor and shift_factor are"
        )
    found = _built(cls, settings, f"{where}.settings")
    factor = autoencoder_factor(found)
    if image_side % factor:
        raise ConfigError(
            f"{where}: it makes pixels {factor} × {factor} to one latent, which do not fit pictures of {image_side} × {image_side}"
        )
    return found


def autoencoder_factor(autoencoder: Any) -> int:
    """Rows of pixels to one row of latents."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def _built(cls: Any, settings: dict[str, Any], where: str) -> Any:
    try:
        return cls(**settings)
    except (TypeError, ValueError, NotImplementedError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: diffusers' {cls.__name__} refuses them: {' '.join(str(error).split())}") from error


def build_scheduler(config: DiffusionDecoderConfig, steps: int) -> Any:
    """A fresh scheduler, set to so many steps. Raises `ConfigError` for arguments that it does not have or that contradict the
    objective, and a number of steps that it cannot take."""
    cls, settings, where = diffusers_class(config.scheduler), dict(config.schedule), f"{WHERE}.schedule"
    known = inspect.signature(cls.__init__).parameters
    noise = inspect.signature(diffusers_class("DDPMScheduler").__init__).parameters
    for name in settings:
        if name in _FOLLOWS[config.objective]:
            raise ConfigError(f"{where}.{name}: follows from objective {config.objective}; leave it out")
        # Of epsilon the schedule holds what training needs too: of two schedulers each is given what it knows.
        if name not in known and (config.objective != "epsilon" or name not in noise):
            raise ConfigError(
                f"{where}.{name}: diffusers' {cls.__name__} has no such argument{did_you_mean(name, known)}"
            )
    if config.objective == "epsilon":
        settings.setdefault("timestep_spacing", "trailing")  # few steps start where the noise is strongest
        settings.setdefault("clip_sample", config.space == "pixel")
    with torch.device("cpu"):  # also where the networks are built on meta
        scheduler = _built(cls, {k: v for k, v in settings.items() if k in known}, where)
        try:
            if config.scheduler == "FlowMatchEulerDiscreteScheduler":
                # By itself it ends its last but one step at 1/1000, so that the last does nothing.
                scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
            else:
                scheduler.set_timesteps(steps)
        except ValueError as error:
            raise ConfigError(
                f"{WHERE}.steps: {cls.__name__} takes no {steps}: {' '.join(str(error).split())}"
            ) from error
    return scheduler


def noise_alphas(config: DiffusionDecoderConfig) -> Tensor:
    """``(T,)`` float32 on the CPU: the share ᾱ of the picture's variance at every time of the epsilon objective's training."""
    cls = diffusers_class("DDPMScheduler")
    known = inspect.signature(cls.__init__).parameters
    with torch.device("cpu"):
        return _built(cls, {k: v for k, v in config.schedule.items() if k in known}, f"{WHERE}.schedule").alphas_cumprod


def saved_settings(folder: str, cls: Any, where: str) -> dict[str, Any]:
    """The arguments that a model of `diffusers` was saved with. Raises `CheckpointError` for a folder of something else."""
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{where}: {path} does not exist; name a folder that diffusers' {cls.__name__}.save_pretrained wrote"
        )
    stored = read_json(path)
    if stored.get("_class_name") != cls.__name__:
        raise CheckpointError(f"{where}: {folder} holds a {stored.get('_class_name')}, {cls.__name__} is expected")
    known = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in stored.items() if key in known}


def load_saved(module: nn.Module, folder: str, where: str, *, kept_channels: int | None = None) -> None:
    """The weights that ``save_pretrained`` of `diffusers` wrote.

    Args:
        module: takes them.
        folder: where they are.
        where: how errors name the setting.
        kept_channels: of a network with more input channels than the saved one: its first channels are the saved ones, the others
            start at zero, so that it does at first what the saved one does.

    Raises:
        CheckpointError: naming the file or the first tensors that do not fit.
    """
    path = Path(folder).expanduser() / _WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{where}: {path} does not exist{_other_files(path)}")
    state, own = read_safetensors(path), module.state_dict()
    if kept_channels is not None:
        name = next(n for n in ("conv_in.weight", "pos_embed.proj.weight") if n in own)
        saved = state.get(name)
        if saved is not None and saved.shape[1] == kept_channels and own[name].shape[0] == saved.shape[0]:
            state[name] = torch.cat([saved, saved.new_zeros(own[name][:, kept_channels:].shape)], 1)
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape] + [n for n in state if n not in own]
    if wrong:
        raise CheckpointError(f"{where}: {path} does not fit: {', '.join(wrong[:4])} …")
    module.load_state_dict(state)


def _other_files(path: Path) -> str:
    there = sorted(file.name for file in path.parent.glob("*model*"))
    return f" (there: {', '.join(there[:4])}); save it unsharded, as safetensors" if there else ""
