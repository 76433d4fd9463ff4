"""Do checkpoints in their authors' own layouts come in with nothing changed: EVE, EVEv2, SOLO, InternVL?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from mllm.encoders.eve import PatchEmbeddingLayer
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.models.foreign.convert import convert
from mllm.models.foreign.read import recognise
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.processor import MllmProcessor
from tests.helpers import picture, tiny_tokenizer
from tests.integration.test_convert import NEXT_SIZES, compare, internvl_checkpoint

TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
SHAPES = [(60, 30), (30, 60), (40, 40), (400, 3), (37, 53), (99, 20)]
"""width × height; each costs hundreds of tokens."""


def normalised(image: Image.Image, size: tuple[int, int], filter_: int, statistics: Any) -> Tensor:
    """``(3, H, W)`` of a picture at (width, height), as PIL resizes it."""
    return normalize(pil_to_tensor(image.resize(size, filter_)).float() / 255, *statistics)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def random(model: nn.Module, seed: int) -> nn.Module:
    """Wide random weights, norms and biases included, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            start = 1.0 if parameter.ndim == 1 and "norm" in name and "bias" not in name else 0.0
            parameter.copy_(start + torch.randn(parameter.shape, generator=generator) * wide)
    return model.eval()


def theirs_of(tower: nn.Module, decoder: nn.Module, more: dict[str, nn.Module]) -> dict[str, Tensor]:
    found = dict(decoder.state_dict()) | {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    for prefix, module in more.items():
        found |= {f"{prefix}.{key}": value for key, value in module.state_dict().items()}
    return found


def eve(folder: Path, **settings: Any) -> Callable[[Tensor, list[int], list[int]], Tensor]:
    """A random EVE as its authors write it. Returns its logits for a picture and the ids before and after."""
    layer = random(PatchEmbeddingLayer(16, 14, 2, 8), 0)
    projector = random(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32)), 1)
    text = LlamaConfig(vocab_size=270, tie_word_embeddings=False, **TEXT)
    decoder = random(LlamaForCausalLM(text), 2)
    config = {**text.to_dict(), "model_type": "eve", "architectures": ["EVELlamaForCausalLM"], "mm_hidden_size": 16}
    config |= {"mm_vision_tower": "openai/eve-patch14-anypixel-672", "mm_projector_type": "mlp2x_gelu"}
    config |= {
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "requires_cliploss": True,
        "use_mm_proj": True,
    }
    config |= {"mm_vision_tower_clip": "openai/clip-vit-large-patch14-336", "tune_mm_mlp_adapter": False, **settings}
    teacher = {"model.vision_clip": nn.Linear(2, 2), "model.vision_tower_compressor": nn.Linear(2, 2)}
    tensors = theirs_of(layer, decoder, {"model.mm_projector": projector, **teacher})
    write(folder, tensors, config, tiny_tokenizer(template=None))

    def logits(image: Image.Image, before: list[int], after: list[int]) -> Tensor:
        width, height = image.size
        short = lambda side: -(-336 * side // max(width, height) // 14) * 14 * 2  # noqa: E731
        size = (672, short(height)) if width > height else (short(width), 672)
        seen = projector(layer(normalised(image, size, Image.Resampling.BICUBIC, CLIP)[None]))[0]
        embed = decoder.model.embed_tokens
        rows = torch.cat([embed(torch.tensor(before, dtype=torch.long)), seen, embed(torch.tensor(after))])
        return decoder(inputs_embeds=rows[None]).logits[0]

    return logits


class TwoModels(nn.Module):
    """EVEv2's decoder by its definition: two Qwen2, of which the second does what a layer does to visual tokens."""

    def __init__(self, text: Qwen2ForCausalLM, visual: Qwen2ForCausalLM):
        super().__init__()
        self.text, self.visual = text, visual

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def chosen(a: nn.Module, b: nn.Module, y: Tensor) -> Tensor:
            return torch.where(mask[None, :, None], b(y), a(y))

        body = self.text.model
        rotary = body.rotary_emb(x, torch.arange(x.shape[1])[None])
        for one, other in zip(body.layers, self.visual.model.layers, strict=True):
            a, b = one.self_attn, other.self_attn
            y = chosen(one.input_layernorm, other.input_layernorm, x)
            q, k, v = (
                chosen(getattr(a, name), getattr(b, name), y).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k = apply_rotary_pos_emb(q, k, *rotary)
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
            x = x + chosen(a.o_proj, b.o_proj, read)
            y = chosen(one.post_attention_layernorm, other.post_attention_layernorm, x)
            x = x + chosen(one.mlp, other.mlp, y)
        return self.text.lm_head(body.norm(x))


def evev2(folder: Path, **settings: Any) -> Callable[[Image.Image, list[int], list[int]], Tensor]:
    layer = random(nn.Sequential(nn.Conv2d(3, 12, 16, 16), nn.GELU(), nn.Conv2d(12, 32, 2, 2)), 0)
    generator = torch.Generator().manual_seed(3)
    start, split = torch.randn(2, 32, generator=generator)
    text = Qwen2Config(vocab_size=270, tie_word_embeddings=False, **TEXT)
    pair = TwoModels(random(Qwen2ForCausalLM(text), 1), random(Qwen2ForCausalLM(text), 2))  # type: ignore[arg-type]
    config = {**text.to_dict(), "model_type": "eve-qwen2", "architectures": ["EVEQwen2ForCausalLM"], "add_moe": True}
    config |= {"moe_part": "layernorm-self_attn-mlp", "mm_hidden_size": 12, "tune_MOE": True}
    config |= {"mm_vision_tower": "openai/eve-anyratio-res320-patch16", **settings}
    tensors = dict(pair.text.state_dict())
    tensors |= {f"model.vision_tower.patch_embedding.{k}": v for k, v in layer.state_dict().items()}
    tensors |= {"model.vision_tower.start_embedding": start, "model.vision_tower.split_embedding": split}
    for key, value in pair.visual.state_dict().items():
        parts = key.split(".")
        if parts[1] == "layers":  # the twin is named beside its part: self_attn.moe_q_proj, moe_mlp.up_proj
            at = 4 if parts[3] == "self_attn" else 3
            tensors[".".join([*parts[:at], f"moe_{parts[at]}", *parts[at + 1 :]])] = value
    write(folder, tensors, config, tiny_tokenizer(template=None))

    def logits(image: Image.Image, before: list[int], after: list[int]) -> Tensor:
        scale = (image.size[0] * image.size[1]) ** 0.5 / 320
        size = tuple(max(-int(-side / scale // 32), 1) * 32 for side in image.size)
        found = layer(normalised(image, size, Image.Resampling.BICUBIC, CLIP)[None])[0]  # type: ignore[arg-type]
        ends = split[:, None, None].expand(-1, found.shape[1], 1)
        seen = torch.cat([start[None], torch.cat([found, ends], dim=2).flatten(1).T])
        embed = pair.text.model.embed_tokens
        rows = torch.cat([embed(torch.tensor(before, dtype=torch.long)), seen, embed(torch.tensor(after))])
        place = torch.arange(len(rows))
        return pair(rows[None], (place >= len(before)) & (place < len(before) + len(seen)))[0]

    return logits


def solo(folder: Path, **settings: Any) -> Callable[[Image.Image, list[int], list[int]], Tensor]:
    tokenizer = tiny_tokenizer(template=None, image_token=None)
    tokenizer.add_tokens(["<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>"])
    opening, patch, row = tokenizer.convert_tokens_to_ids(["<vision>", "<vpatch>", "<vrow_sep>"])
    text = MistralConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, sliding_window=4096, **TEXT)
    decoder = random(MistralForCausalLM(text), 0)
    linear = random(nn.Linear(3 * 32 * 32, 32, bias=False), 1)
    config = {**text.to_dict(), "architectures": ["SoloForCausalLM"], "vision_patch_size": 32, **settings}
    tensors = {**decoder.state_dict(), "model.embed_vision_patch.weight": linear.weight}
    write(folder, tensors, config, tokenizer)

    def logits(image: Image.Image, before: list[int], after: list[int]) -> Tensor:
        longer = min(-(-max(image.size) // 32) * 32, 1024)
        other = max(-(-int(longer * min(image.size) / max(image.size)) // 32), 1) * 32
        size = (longer, other) if image.size[0] >= image.size[1] else (other, longer)
        cells = normalised(image, size, Image.Resampling.BILINEAR, IMAGENET).unfold(1, 32, 32).unfold(2, 32, 32)
        cells = cells.permute(1, 2, 0, 3, 4).flatten(2)
        ids, patches = [opening], [torch.zeros(32)]
        for number, line in enumerate(cells):
            if number:
                ids, patches = [*ids, row], [*patches, torch.zeros(32)]
            ids, patches = [*ids, *[patch] * len(line)], [*patches, *linear(line)]
        seen = decoder.model.embed_tokens(torch.tensor([*ids, opening])) + torch.stack([*patches, torch.zeros(32)])
        embed = decoder.model.embed_tokens
        rows = torch.cat([embed(torch.tensor(before, dtype=torch.long)), seen, embed(torch.tensor(after))])
        return decoder(inputs_embeds=rows[None]).logits[0]

    return logits


FREE = {"eve": eve, "evev2": evev2, "solo": solo}


@pytest.mark.parametrize("kind", FREE)
@torch.no_grad()
def test_models_without_encoder_give_the_same_logits(kind: str, tmp_path: Path) -> None:
    """Beside transformers' own decoders and what the authors put before them, at odd sizes."""
    theirs = FREE[kind](tmp_path / "theirs")
    assert recognise(tmp_path / "theirs") == kind
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = MllmForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    direct = MllmForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    processor = MllmProcessor.from_pretrained(tmp_path / "ours")
    write_ids = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for number, size in list(enumerate(SHAPES))[:: 2 if kind == "eve" else 1]:  # EVE's take 672 pixels' worth of tokens
        image = picture(number, size=size)
        before, after = write_ids("which " * number), write_ids("\nis it?")
        given = processor(
            text=[f"{'which ' * number}{processor.image_token}\nis it?"], images=[image], return_tensors="pt"
        )
        want = theirs(image, before, after)
        for model in (direct, ours)[number > 0 :]:
            place = given["input_ids"] == processor.image_token_id
            ids = given["input_ids"].masked_fill(place, model.config.image_token_id)  # convert takes the tokenizer's
            have = model(**{**given, "input_ids": ids}).logits[0]
            assert have.shape[0] == want.shape[0], size
            assert (have[:, : want.shape[1]] - want).abs().max() <= 2e-5 * max(1.0, float(want.abs().max())), size
    blind = dict(given, pixel_values=-given["pixel_values"])
    assert (ours(**blind).logits[0, -1] - have[-1]).abs().max() > 1e-2, "the pictures must matter"
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    answered = [*said, {"role": "assistant", "content": "red"}, {"role": "user", "content": "sure?"}]
    text = processor.apply_chat_template(answered, add_generation_prompt=True)
    if kind == "solo":
        assert text == "<vpatch><s>[INST] what? [/INST] red</s>[INST] sure? [/INST]"
    else:
        assert text == "<s>USER: <image>\nwhat? ASSISTANT: red</s>USER: sure? ASSISTANT:"


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "tokens around the picture": (eve, {"mm_use_im_start_end": True}, "mm_use_im_start_end: True is not supported"),
    "an unknown size": (eve, {"mm_vision_tower": "openai/clip-vit"}, "copy the file into the folder"),
    "an unread setting": (eve, {"gate": 0.5}, "does not know .gate"),
    "weights for some parts": (evev2, {"moe_part": "self_attn-mlp"}, "moe_part: 'self_attn-mlp' is not supported"),
    "another patch": (solo, {"vision_patch_size": 16}, "reads 3072 numbers, patches of 16 pixels have 768"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_of_them_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, settings, message = REFUSED[case]
    make(tmp_path / "theirs", **settings)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_image_processors_file_is_read_where_it_lies(tmp_path: Path) -> None:
    eve(tmp_path / "theirs", mm_vision_tower="openai/eve-hd")
    place = tmp_path / "theirs" / "openai" / "eve-hd"
    place.mkdir(parents=True)
    said = {"patch_stride": 14, "conv_stride": 2, "image_size": 1344, "image_size_clip": 336, "patch_stride_clip": 14}
    said |= {"do_resize": False, "do_center_crop": False, "image_mean": CLIP[0], "image_std": CLIP[1], "resample": 3}
    (place / "preprocessor_config.json").write_text(json.dumps(said))
    model = MllmForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert model.config.layout((100, 50)).patches == (48, 24)
    (place / "preprocessor_config.json").write_text(json.dumps(said | {"do_resize": True}))
    with pytest.raises(ConfigError, match="do_resize: True is not supported: EVE resizes pictures itself"):
        MllmForConditionalGeneration.from_pretrained(tmp_path / "theirs")


def as_authors(theirs: Any, language: str) -> dict[str, Tensor]:
    """transformers' InternVL under the authors' names."""
    found: dict[str, Tensor] = {}
    names = {"attention.projection_layer": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    names |= {"lambda_1": "ls1", "lambda_2": "ls2", "encoder.layer.": "encoder.layers.", "cls_token": "class_embedding"}
    names |= {"position_embeddings": "position_embedding", "patch_embeddings.projection": "patch_embedding"}
    tower = theirs.model.vision_tower.state_dict()
    for key, value in tower.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            value = torch.cat([tower[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            key = key.replace(".q_proj.", ".qkv.")
        for ours, authors in names.items():
            key = key.replace(ours, authors)
        found[f"vision_model.{key.replace('.attention.', '.attn.')}"] = value
    for number, part in enumerate(("layer_norm", "linear_1", None, "linear_2")):
        if part is not None:
            state = getattr(theirs.model.multi_modal_projector, part).state_dict()
            found |= {f"mlp1.{number}.{key}": value for key, value in state.items()}
    decoder = theirs.model.language_model.state_dict()
    if language == "qwen2":
        return found | {
            **{f"language_model.model.{key}": value for key, value in decoder.items()},
            "language_model.lm_head.weight": theirs.lm_head.weight,
        }
    names = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
    names |= {"mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "embed_tokens": "tok_embeddings"}
    names |= {"post_attention_layernorm": "ffn_norm"}
    heads = theirs.config.text_config.num_key_value_heads
    for key, value in decoder.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            parts = [decoder[key.replace(".q_proj.", f".{part}_proj.")].unflatten(0, (heads, -1)) for part in "qkv"]
            key, value = key.replace("self_attn.q_proj", "attention.wqkv"), torch.cat(parts, dim=1).flatten(0, 1)
        for ours, authors in names.items():
            key = key.replace(ours, authors)
        found[f"language_model.model.{key}"] = value
    return found | {"language_model.output.weight": theirs.lm_head.weight}


def authors_internvl(folder: Path, language: str, **settings: Any) -> tuple[Any, Any]:
    """The checkpoint of `internvl_checkpoint` as OpenGVLab writes it, and transformers' own model and processor."""
    theirs, reader = internvl_checkpoint()
    if language == "internlm2":
        text = {key: value for key, value in theirs.config.text_config.to_dict().items() if key in TEXT}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        theirs.config.text_config = LlamaConfig(vocab_size=320, **text)
        theirs = type(theirs)(theirs.config)
    reader.image_processor.image_mean, reader.image_processor.image_std = IMAGENET
    theirs = random(theirs, 4)
    vision, text = theirs.config.vision_config, theirs.config.text_config
    said = {key: getattr(vision, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    said |= {"intermediate_size": vision.intermediate_size, "norm_type": "layer_norm", "model_type": "intern_vit_6b"}
    said |= {"image_size": vision.image_size[0], "patch_size": vision.patch_size[0], "qkv_bias": False}
    said |= {"qk_normalization": False, "use_flash_attn": True, "drop_path_rate": 0.1, "num_beams": 1, "top_k": 50}
    kind = {"qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM"}[language]
    inner = {**text.to_dict(), "architectures": [kind], "max_length": 20, "temperature": 1.0, "typical_p": 1.0}
    config = {"model_type": "internvl_chat", "vision_config": said, "llm_config": inner, "ps_version": "v2"}
    config |= {"downsample_ratio": 0.5, "select_layer": -1, "dynamic_image_size": True, "use_thumbnail": True}
    config |= {"min_dynamic_patch": 1, "max_dynamic_patch": 6, "template": "internvl2_5", **settings}
    write(folder, as_authors(theirs, language), config, reader.tokenizer)
    return theirs, reader


@pytest.mark.parametrize("language", ["qwen2", "internlm2"])
def test_internvl_of_its_authors_gives_the_logits_of_transformers_own(language: str, tmp_path: Path) -> None:
    theirs, reader = authors_internvl(tmp_path / "theirs", language)
    assert recognise(tmp_path / "theirs") == "internvl_chat"
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = MllmForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    processor = MllmProcessor.from_pretrained(tmp_path / "ours")
    mark = processor.image_token
    texts = [f"USER: {mark}\n{'what? ' * (k % 3)}ASSISTANT:" for k in range(len(NEXT_SIZES))]
    pictures = [picture(k, size=size) for k, size in enumerate(NEXT_SIZES)]
    compare(theirs, reader, ours, processor, texts, [[image] for image in pictures])
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{mark}\nwhat?<|im_end|>\n<|im_start|>assistant\n"


def test_what_would_be_lost_of_an_authors_internvl_is_refused_by_name(tmp_path: Path) -> None:
    authors_internvl(tmp_path / "theirs", "qwen2")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    for changes, message in (
        ({"ps_version": "v1"}, "ps_version: 'v1' is not supported: v1 transposes the picture's tokens"),
        ({"force_image_size": 56}, "force_image_size is not supported"),
        (
            {"llm_config": {**config["llm_config"], "architectures": ["Phi3ForCausalLM"]}},
            "Phi3ForCausalLM.*not supported",
        ),
        ({"vision_config": {**config["vision_config"], "window": 7}}, "does not know .window"),
    ):
        file.write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=message):
            convert(str(tmp_path / "theirs"), tmp_path / "ours")
    file.write_text(json.dumps(config))
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    save_file({**weights, "mlp2.0.weight": torch.ones(2)}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place in the converted model.*mlp2"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).unlink()
    with pytest.raises(CheckpointError, match="needs its tokenizer's files, which say the id of <img>"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    # InternLM2's tokenizer: ids in a file, the class in code of the authors' own
    (tmp_path / "theirs" / "added_tokens.json").write_text('{"<img>": 261, "</img>": 262, "<IMG_CONTEXT>": 263}')
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"tokenizer_class": "InternLM2Tokenizer"}')
    assert MllmForConditionalGeneration.from_pretrained(tmp_path / "theirs").config.image_token_id == 263
    with pytest.raises(UnavailableError, match="its tokenizer cannot be read"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
