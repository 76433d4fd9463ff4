"""How do pictures and texts meet in the space of a CLIP or SigLIP model?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.damage import naming_damage
from mllm.errors import CheckpointError, ConfigError, DataError
from mllm.noise import load_report_unless_told
from mllm.types import ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = "a photo of a {}."
NO_CLASS_TOKEN = (
    "CLIP compares texts with its class token, which patch tokens do not hold; a zero-shot score needs a SigLIP teacher, or "
    "a tokenizer whose semantic features have the class token as `pooled`"
)
FAMILIES = ("clip", "siglip", "siglip2")


class JointModel(nn.Module):
    """A CLIP, SigLIP or SigLIP2 model of transformers with its text tokenizer, frozen.

    Shapes: B images · K texts · C classes · N patches · T width of the vision side · J width of the common space.
    """

    model: Any
    vision: Any

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "model"):
        """Raises `ConfigError` unless the model has a text side and a vision side that pools."""
        super().__init__()
        family = getattr(model.config, "model_type", None)
        if family not in FAMILIES or not hasattr(model, "get_text_features"):
            raise ConfigError(
                f"{name}: a {family!r} model has no text side to compare images with; name a whole "
                f"{', '.join(FAMILIES[:-1])} or {FAMILIES[-1]} model, not its vision part alone"
            )
        core = getattr(model.vision_model, "vision_model", model.vision_model)
        if family != "clip" and getattr(core, "head", None) is None:
            raise ConfigError(f"{name}: its vision side has no pooling head (vision_use_head is false)")
        self.model, self.tokenizer, self.name, self.family = model, tokenizer, name, family
        self.vision = core
        self.width: int = model.config.vision_config.hidden_size
        self.depth: int = model.config.vision_config.num_hidden_layers
        self.patch_size: int = model.config.vision_config.patch_size
        self.requires_grad_(False).eval()

    @classmethod
    @load_report_unless_told()
    def open(cls, name: str) -> JointModel:
        """A folder, or the name of a model in the hub's cache (``name`` or ``name@revision``), in fp32.

        Raises `ConfigError` when it cannot be read or lacks a part, `CheckpointError` when weights are missing.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        folder = Path(name).expanduser()
        source, _, revision = (str(folder), "", "") if folder.is_dir() else name.partition("@")
        options = {"revision": revision} if revision else {}
        try:
            with naming_damage(source):
                config = AutoConfig.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{name}: no model of transformers ({_first_line(error)}); give a folder with config.json, or a hub name"
            ) from error
        if config.model_type not in FAMILIES:
            raise ConfigError(
                f"{name}: a {config.model_type!r} model has no text side to compare images with; name a whole "
                f"{', '.join(FAMILIES[:-1])} or {FAMILIES[-1]} model, not its vision part alone"
            )
        cure = "save it beside the model, tokenizer.json and tokenizer_config.json"
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception as error:  # whatever the tokenizer's files make it raise
            raise ConfigError(f"{name}: its text tokenizer cannot be read ({_first_line(error)}); {cure}") from error
        if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:  # transformers 5 makes one up where there is none
            raise ConfigError(f"{name}: its text tokenizer is missing; {cure}")
        try:
            with naming_damage(source):
                model, found = AutoModel.from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True, **options
                )
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{name}: its weights cannot be read ({_first_line(error)})") from error
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"])[:3])
            raise CheckpointError(f"{name}: lacks the weights {missing} …; name a whole model")
        return cls(model, tokenizer, name)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Texts → ``(K, J)`` of length 1. They are written in lower case, as all three families were trained; SigLIP's
        are padded to its full length and read without a mask.

        Raises `DataError` for a text that is longer than the model reads, `ConfigError` for a tokenizer of another
        model.
        """
        limit, found = self.model.config.text_config.max_position_embeddings, []
        for start in range(0, len(texts), batch_size):
            part = [text.lower() for text in texts[start : start + batch_size]]
            fixed = {} if self.family == "clip" else {"max_length": limit}
            try:
                inputs = self.tokenizer(part, padding="max_length" if fixed else True, return_tensors="pt", **fixed)
            except ValueError as error:
                raise ConfigError(f"{self.name}: its text tokenizer does not work ({_first_line(error)})") from error
            ids: Tensor = inputs["input_ids"]
            if ids.shape[1] > limit:
                longest = max(part, key=lambda text: len(self.tokenizer(text)["input_ids"]))
                raise DataError(f"{longest!r} is {ids.shape[1]} tokens long; {self.name} reads {limit}: shorten it")
            size = self.model.config.text_config.vocab_size
            if ids.numel() == 0 or int(ids.max()) >= size:
                raise ConfigError(f"{self.name}: its text tokenizer does not fit a vocabulary of {size}")
            given = {"input_ids": ids.to(self.device)}
            if self.family == "clip" and "attention_mask" in inputs:
                given["attention_mask"] = inputs["attention_mask"].to(self.device)
            found.append(F.normalize(_pooled(self.model.get_text_features(**given)).float(), dim=-1))
        return torch.cat(found)

    def embed_classes(self, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> Tensor:
        """Class names in every template → ``(C, J)``: each text to length 1, their mean, to length 1 again (CLIP, arXiv
        2103.00020, section 3.1.4). Underscores of folder names become spaces."""
        names = [name.replace("_", " ") for name in classes]
        vectors = self.embed_texts([template.replace("{}", name) for name in names for template in templates])
        return F.normalize(vectors.view(len(names), len(templates), -1).mean(1), dim=-1)

    @torch.no_grad()
    def embed_images(self, pixels: Tensor, image: ImageSpec, layer: int) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] of any size → ``(B, J)`` and the patch tokens ``(B, N, T)`` after ``layer`` blocks.

        image: the size, mean and std that the vision side is given.
        """
        size = (image.height, image.width)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (image.mean, image.std))
        pixels = (pixels * 0.5 + 0.5 - mean) / std
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hook = self.vision.encoder.layers[layer - 1].register_forward_hook(keep)
        try:
            whole = _pooled(self.model.get_image_features(**self._vision_inputs(pixels)))
        finally:
            hook.remove()
        number = (image.height // self.patch_size) * (image.width // self.patch_size)
        return whole.float(), seen[0][:, -number:].float()

    def _vision_inputs(self, pixels: Tensor) -> dict[str, Any]:
        if self.family != "siglip2":
            native = self.model.config.vision_config.image_size
            return {"pixel_values": pixels, "interpolate_pos_encoding": pixels.shape[-2:] != (native, native)}
        batch, channels, height, width = pixels.shape
        side = self.patch_size
        rows, columns = height // side, width // side
        patches = pixels.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([[rows, columns]], device="cpu")  # read there; one shape for the whole batch
        return {
            "pixel_values": patches.reshape(batch, rows * columns, side * side * channels),
            "pixel_attention_mask": None,
            "spatial_shapes": shapes,
        }

    def finish(self, tokens: Tensor, layer: int, *, normed: bool = False) -> Tensor:
        """Patch tokens ``(B, N, T)`` after ``layer`` blocks → ``(B, J)``: the blocks that follow, the last norm (unless
        the tokens are ``normed`` already) and SigLIP's pooling head.

        Raises `ConfigError` for CLIP, whose embedding is its class token's: patch tokens were never trained to be
        compared with texts.
        """
        if self.family == "clip":
            raise ConfigError(f"{self.name}: {NO_CLASS_TOKEN}")
        x = tokens
        for block in list(self.vision.encoder.layers)[layer:]:
            x = block(x, None)
            x = x[0] if isinstance(x, tuple) else x
        return self.vision.head(x if normed else self.vision.post_layernorm(x))

    def project(self, pooled: Tensor) -> Tensor:
        """The vision side's pooled feature ``(B, T)`` (CLIP: the class token after the last norm) → ``(B, J)``."""
        return self.model.visual_projection(pooled) if self.family == "clip" else pooled

    @torch.no_grad()
    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """``(B, J)`` and ``(K, J)`` → ``(B, K)``, as the model itself scores images against texts."""
        cosine = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        bias = getattr(self.model, "logit_bias", None)
        return cosine * self.model.logit_scale.exp() + (0 if bias is None else bias)


def read_templates(path: Path) -> tuple[str, ...]:
    """One template per line, each with ``{}`` where the class name goes. Raises `DataError` naming the line."""
    if not path.is_file():
        raise DataError(f"templates: {path} is no file")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            if line.count("{}") != 1:
                raise DataError(f"{path}, line {number}: needs one {{}} for the class name, as in {TEMPLATE!r}")
            found.append(line.strip())
    if not found:
        raise DataError(f"{path}: no templates; write one per line, as in {TEMPLATE!r}")
    return tuple(found)


def _pooled(output: Any) -> Tensor:
    """transformers gives the embedding itself or an output that holds it, by version."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
