"""Do known checkpoints come in with nothing changed?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from mllm.errors import CheckpointError, ConfigError
from mllm.models.foreign.convert import convert
from mllm.models.foreign.read import recognise
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.processor import MllmProcessor
from tests.helpers import picture, tiny_tokenizer

SIZES = {
    "small": ({"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64},
              {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}, 28, 7),
    "wider": ({"hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 128},
              {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 256}, 48, 8),
}  # fmt: skip


def llava(size: str, folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random LLaVA checkpoint as transformers writes it."""
    vision, text, pixels, patch = SIZES[size]
    torch.manual_seed(len(size))
    tokenizer = tiny_tokenizer(template=None)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=pixels, patch_size=patch, projection_dim=16, **vision),
        text_config=LlamaConfig(vocab_size=320, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # random features are faint: make the picture matter
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    images = CLIPImageProcessorPil(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("size", sorted(SIZES))
def test_llava_gives_the_same_logits_and_greedy_tokens(size: str, tmp_path: Path) -> None:
    theirs, reader = llava(size, tmp_path / "llava")
    assert recognise(tmp_path / "llava") == "llava"
    convert(str(tmp_path / "llava"), tmp_path / "ours")
    ours = MllmForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    direct = MllmForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    processor = MllmProcessor.from_pretrained(tmp_path / "ours")
    prompts = [
        "USER: <image>\nwhat? ASSISTANT:",
        "USER: <image> or <image>, which one is it then? ASSISTANT:",
        "USER: hi ASSISTANT:",
    ]
    images = [[picture(1)], [picture(2, size=(64, 20)), picture(3, size=(31, 77))], []]
    flat = [image for group in images for image in group]
    for texts, pictures in [*(([t], i) for t, i in zip(prompts, images)), (prompts, flat)]:
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        expected = reader(text=texts, images=pictures or None, **options)
        given = processor(text=texts, images=pictures or None, **options)
        assert torch.equal(expected["input_ids"], given["input_ids"])
        if pictures:
            torch.testing.assert_close(given["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
        with torch.no_grad():
            reference = theirs(**expected).logits
            visible = expected["attention_mask"].bool()
            for model in (ours, direct):
                torch.testing.assert_close(model(**expected).logits[visible], reference[visible], atol=1e-5, rtol=0)
                assert (model(**given).logits[visible] - reference[visible]).abs().max() <= 1e-5
        settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        settings["suppress_tokens"] = list(ours.config.unassigned_ids)  # theirs writes ids that no token has
        want = theirs.generate(**expected, **settings)
        assert torch.equal(ours.generate(**given, **settings), want)
        assert torch.equal(direct.generate(**given, **settings), want)
    blind = theirs(
        input_ids=expected["input_ids"],
        attention_mask=expected["attention_mask"],
        pixel_values=-expected["pixel_values"],
    )
    assert (blind.logits - reference).abs().max() > 1e-2, "the pictures must matter for this test to mean anything"


NEXT_SIZES = [
    (28, 28), (56, 56), (28, 56), (84, 28), (1, 1), (1, 400), (400, 1), (37, 53), (53, 37), (640, 480), (480, 640), (99, 101),
    (30, 90), (90, 30), (55, 57), (10, 300), (200, 201), (29, 27), (13, 170), (333, 111),
]  # fmt: skip
"""width × height"""


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
LARGER = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
"""Height × width."""


def next_checkpoint() -> tuple[Any, Any]:
    vision, text, pixels, patch = SIZES["small"]
    tokenizer = tiny_tokenizer(template=None)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=pixels, patch_size=patch, projection_dim=16, **vision),
        text_config=LlamaConfig(vocab_size=320, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}, image_grid_pinpoints=PINPOINTS
    )
    reader = LlavaNextProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaNextForConditionalGeneration(config), reader


def siglip_next_checkpoint() -> tuple[Any, Any]:
    """SigLIP has no class token; the family takes its last layer before the norm that follows it."""
    vision, _, pixels, patch = SIZES["small"]
    model, reader = next_checkpoint()
    config = model.config
    config.vision_config = SiglipVisionConfig(image_size=pixels, patch_size=patch, vision_use_head=False, **vision)
    config.vision_feature_select_strategy, config.vision_feature_layer = "full", -1
    reader.vision_feature_select_strategy, reader.num_additional_image_tokens = "full", 0
    return LlavaNextForConditionalGeneration(config), reader


def onevision_checkpoint(aspect: str = "anyres_max_3", layer: int = -1) -> tuple[Any, Any]:
    """SigLIP, whose last layer has not passed its norm, tiles whose joined map is shrunk, a newline behind a lone picture."""
    vision, text, pixels, patch = SIZES["small"]
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=pixels, patch_size=patch, vision_use_head=False, **vision),
        text_config=Qwen2Config(vocab_size=320, num_key_value_heads=1, tie_word_embeddings=False, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=LARGER,
        vision_aspect_ratio=aspect,
        vision_feature_layer=layer,
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": pixels, "width": pixels}, image_grid_pinpoints=LARGER, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    reader = LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": pixels, "width": pixels}),
        num_image_tokens=(pixels // patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect,
    )
    return LlavaOnevisionForConditionalGeneration(config), reader


def internvl_checkpoint(pooled: bool = True, layer: int = -1) -> tuple[Any, Any]:
    """Dynamic tiles and thumbnail, four tokens merged into one, between tokens of the vocabulary."""
    vision, text, pixels, patch = SIZES["small"]
    tokenizer = tiny_tokenizer(template=None, image_token=None)
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    extra = {**marks, "video_token": "<video>"}
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=extra,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            image_size=[pixels, pixels],
            patch_size=[patch, patch],
            use_mean_pooling=pooled,
            layer_scale_init_value=1.0,
            **vision,
        ),
        text_config=Qwen2Config(vocab_size=320, num_key_value_heads=1, tie_word_embeddings=False, **text),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
        vision_feature_layer=layer,
    )
    images = GotOcr2ImageProcessorPil(crop_to_patches=True, max_patches=6, size={"height": pixels, "width": pixels})
    reader = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(size={"height": pixels, "width": pixels}), image_seq_length=4
    )
    return InternVLForConditionalGeneration(config), reader


TILED: dict[str, Any] = {
    "llava_next": next_checkpoint,
    "llava_next, the last layer of SigLIP": siglip_next_checkpoint,
    "llava_onevision": onevision_checkpoint,
    "llava_onevision, a layer before the last": partial(onevision_checkpoint, "anyres_max_9", -2),
    "internvl": internvl_checkpoint,
    "internvl with a final norm": partial(internvl_checkpoint, False),
}


@pytest.mark.parametrize("name", TILED)
def test_checkpoints_of_tiles_look_at_the_same_tiles_and_give_the_same_logits(name: str, tmp_path: Path) -> None:
    """At twenty sizes: token ids, pixels, visual tokens and logits."""
    torch.manual_seed(5)
    theirs, reader = TILED[name]()
    kind, theirs = name.split()[0].rstrip(","), theirs.eval()
    with torch.no_grad():  # random features are faint: make the picture matter
        for parameter in theirs.model.multi_modal_projector.parameters():
            parameter.mul_(8)
        for module in theirs.model.vision_tower.modules():  # a norm that does nothing would hide a missing one
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.add_(torch.randn_like(module.weight), alpha=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    reader.save_pretrained(tmp_path / "theirs")
    assert recognise(tmp_path / "theirs") == kind
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours = MllmForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    processor = MllmProcessor.from_pretrained(tmp_path / "ours")
    mark = processor.image_token
    texts = [f"USER: {mark}\n{'what? ' * (k % 3)}ASSISTANT:" for k in range(len(NEXT_SIZES))]
    pictures = [picture(k, size=size) for k, size in enumerate(NEXT_SIZES)]
    compare(theirs, reader, ours, processor, texts, [[image] for image in pictures])
    if kind != "llava_next":  # transformers' own of NeXT cuts every picture, whatever its neighbours
        several = [pictures[9:12], pictures[4:5], pictures[2:4]]
        texts = [f"{mark} or {mark}{mark} here?", f"USER: {mark}\n? ASSISTANT:", f"{mark}{mark}"]
        compare(theirs, reader, ours, processor, texts, several)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["suppress_tokens"] = list(ours.config.unassigned_ids)
    texts = [f"USER: {mark}\n{'what? ' * k}ASSISTANT:" for k in range(3)]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    part = processor(text=texts, images=pictures[8:11], **options)
    want = theirs.generate(**reader(text=texts, images=[[image] for image in pictures[8:11]], **options), **settings)
    assert torch.equal(ours.generate(**part, **settings), want)
    beams = ours.generate(**part, num_beams=2, **settings)
    alone = processor(text=texts[0], images=pictures[8], **options)
    assert torch.equal(beams[:1, -6:], ours.generate(**alone, num_beams=2, **settings)[:, -6:])


def compare(theirs: Any, reader: Any, ours: Any, processor: Any, texts: list[str], images: list[list[Any]]) -> None:
    """Ids, pixels, visual tokens and logits of one batch."""
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    expected, given = reader(text=texts, images=images, **options), processor(text=texts, images=images, **options)
    assert torch.equal(expected["input_ids"], given["input_ids"])
    views = [layout.num_views for layout in ours.model.rules.layouts(given["image_sizes"])]
    pixels = expected["pixel_values"]
    if pixels.dim() == 5:
        assert torch.equal(expected["image_sizes"], given["image_sizes"][:, :2])
        pixels = torch.cat([rows[:count] for rows, count in zip(pixels, views, strict=True)])
    torch.testing.assert_close(given["pixel_values"], pixels, atol=1e-5, rtol=0)
    more = {key: expected[key] for key in ("image_sizes", "batch_num_images") if key in expected}
    with torch.no_grad():
        wanted = theirs.get_image_features(expected["pixel_values"], **more).pooler_output
        have = ours.get_image_features(**_visual(given)).pooler_output
        want = torch.cat([part.reshape(-1, part.shape[-1]) for part in wanted])
        torch.testing.assert_close(torch.cat(list(have)), want, atol=1e-5 * max(1.0, float(want.abs().max())), rtol=0)
        reference, visible = theirs(**expected).logits, expected["attention_mask"].bool()
        assert (ours(**given).logits[visible] - reference[visible]).abs().max() <= 1e-5
        other = {**given, "pixel_values": given["pixel_values"].flip(0)}
        assert (ours(**other).logits[visible] - reference[visible]).abs().max() > 1e-2, "the pictures must matter"


def _visual(inputs: Any) -> dict[str, Any]:
    return {key: inputs[key] for key in ("pixel_values", "image_sizes")}


def test_prismatic_runs_come_in(tmp_path: Path) -> None:
    import timm
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    dino = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28, **options).eval()
    siglip = timm.create_model(
        "vit_base_patch16_siglip_224", num_classes=0, img_size=28, patch_size=14, global_pool="map", **options
    ).eval()
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=64,
            rms_norm_eps=1e-5,
        )
    ).eval()
    projector = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 128), torch.nn.GELU(), torch.nn.Linear(128, 128)
    )
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model": {
                    "model_id": "tiny",
                    "vision_backbone_id": "tiny-dinosiglip",
                    "timm_models": {
                        "dino_featurizer": "vit_small_patch14_reg4_dinov2",
                        "siglip_featurizer": "vit_base_patch16_siglip_224",
                    },
                    "timm_options": {**options, "patch_size": 14},
                    "image_size": 28,
                    "arch_specifier": "no-align+fused-gelu-mlp",
                    "image_resize_strategy": "resize-naive",
                }
            }
        )
    )
    state = {
        "projector": {f"projector.{k}": v for k, v in projector.state_dict().items()},
        "llm_backbone": {f"llm.{k}": v for k, v in llm.state_dict().items()},
        "vision_backbone": {
            **{f"dino_featurizer.{k}": v for k, v in dino.state_dict().items()},
            **{f"siglip_featurizer.{k}": v for k, v in siglip.state_dict().items()},
        },
    }
    torch.save({"model": state}, folder / "checkpoints" / "latest-checkpoint.pt")
    tiny_tokenizer(template=None, image_token=None).save_pretrained(folder)
    convert(str(folder), tmp_path / "ours")
    model = MllmForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    processor = MllmProcessor.from_pretrained(tmp_path / "ours")
    inputs = processor(text="<image>In: what?\nOut: ", images=picture(), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        patches = [
            m.get_intermediate_layers(inputs[key], n={len(m.blocks) - 2})[0]
            for m, key in ((dino, "pixel_values"), (siglip, "pixel_values_semantic"))
        ]
        visual = projector(torch.cat(patches, dim=2))
        text = llm.get_input_embeddings()(inputs["input_ids"][:, processor.rules.layout().num_tokens :])
        expected = llm(inputs_embeds=torch.cat([visual, text], dim=1)).logits
        got = model(**inputs).logits[..., :320]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.save({"model": print}, folder / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(CheckpointError, match="refused, it is not a plain tensor file"):
        convert(str(folder), tmp_path / "again")


def original_llava(folder: Path, tensors: dict[str, Any] | None = None, **settings: Any) -> None:
    """A random checkpoint in the authors' own layout, its CLIP tower beside it."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionModel, LlamaForCausalLM

    vision, text, pixels, patch = SIZES["small"]
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=pixels, patch_size=patch, projection_dim=16, **vision))
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=320, **text))
    tower.save_pretrained(folder / "clip")
    state = {
        **{k: v.contiguous() for k, v in llm.state_dict().items()},
        "model.mm_projector.0.weight": torch.randn(64, 32),
        "model.mm_projector.0.bias": torch.randn(64),
        "model.mm_projector.2.weight": torch.randn(64, 64),
        "model.mm_projector.2.bias": torch.randn(64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
    } | (tensors or {})
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")
    config = {
        **llm.config.to_dict(),
        "model_type": "llava",
        "mm_vision_tower": str(folder / "clip"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "tune_mm_mlp_adapter": False,
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    tiny_tokenizer(template=None).save_pretrained(folder)


def test_the_authors_own_layout_comes_in_with_its_padding(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    original_llava(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    processor = MllmProcessor.from_pretrained(tmp_path / "ours")
    wide = picture(1, size=(64, 16))
    pixels = processor(text="<image>", images=wide, return_tensors="pt")["pixel_values"][0]
    padded = pixels[:, 0].std(dim=-1).max()  # the first row of a wide picture is padding: one colour
    assert float(padded) < 1e-5 and float(pixels.std()) > 0.1


LOST = {
    "no output head": ({"lm_head.weight": None}, {}, "lm_head.weight.*is missing"),
    "two heads where one is said": ({}, {"tie_word_embeddings": True}, "ties the output head"),
    "a layer of a larger model": ({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}, {}, "belong to no part"),
    "an unknown part": ({"model.image_newline": torch.ones(64)}, {}, "no place in the converted model.*image_newline"),
    "a trained tower that is not there": ({}, {"unfreeze_mm_vision_tower": True}, "holds none of its"),
    "a missing weight": ({"model.norm.weight": None}, {}, "1 weights are missing.*norm"),
    "start and end tokens": ({}, {"mm_use_im_start_end": True}, "mm_use_im_start_end: True is not supported"),
    "class token": ({}, {"mm_vision_select_feature": "cls_patch"}, "cls_patch.*is not supported"),
    "tiles": ({}, {"image_aspect_ratio": "anyres"}, "anyres.*is not supported"),
    "an unread setting": ({}, {"mm_gate_strength": 0.5}, "does not know .mm_gate_strength"),
    "another language model": ({}, {"model_type": "llava_mpt"}, "model_type 'llava_mpt' is not supported"),
}


@pytest.mark.parametrize("case", sorted(LOST))
def test_what_conversion_would_lose_is_refused_by_name(case: str, tmp_path: Path) -> None:
    tensors, settings, message = LOST[case]
    original_llava(tmp_path, tensors, **settings)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert(str(tmp_path), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


PROCESSORS: dict[str, tuple[dict[str, Any], str | None]] = {
    "padded to a square": ({"do_pad": True, "image_processor_type": "LlavaImageProcessor"}, None),
    "bilinear": ({"resample": 2}, None),
    "not normalised": ({"do_normalize": False}, None),
    "not resized": ({"do_resize": False}, "do_resize: False is not supported"),
    "another scale": ({"rescale_factor": 0.5}, "rescale_factor: 0.5"),
    "resized larger than its crop": ({"size": {"shortest_edge": 40}}, "resized to 40 and cropped to"),
    "another processor": ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor' is not supported"),
    "an unread setting": ({"do_equalise": True}, "does not know .do_equalise"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(PROCESSORS))
def test_image_settings_are_kept_or_refused(case: str, tmp_path: Path) -> None:
    from transformers import LlavaImageProcessor

    from mllm.models.foreign.pictures import image_settings
    from mllm.processing.pixels import to_pixels
    from mllm.types import ImageSpec

    changes, refused = PROCESSORS[case]
    base = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).to_dict()
    given = json.loads(json.dumps({**base, **changes}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    if refused:
        with pytest.raises(ConfigError, match=refused):
            image_settings(tmp_path)
        return
    ours = image_settings(tmp_path)
    height, width = ours.pop("image_size")
    image = picture(3, size=(61, 30))
    pixels = to_pixels(image, ImageSpec(height=height, width=width, **ours), resampler="torch")
    reader = LlavaImageProcessor(**{k: v for k, v in given.items() if k != "image_processor_type"})
    theirs = reader(image, return_tensors="pt")["pixel_values"][0]
    scale = 1 if given["do_normalize"] else 0.27
    assert (pixels - theirs).abs().max() < 0.03 * scale * 4
    assert (pixels - theirs).abs().mean() < 0.003


def test_transformers_layout_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    llava("small", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    head = next(name for name in whole if name.endswith("lm_head.weight"))
    norm = next(name for name in whole if name.endswith("layers.0.input_layernorm.weight"))
    for change, message in (
        ({head: None}, "1 weights are missing"),
        ({norm: None}, "1 weights are missing"),
        ({"model.second_tower.weight": torch.ones(2)}, "belong to no part"),
    ):
        save_file({k: v for k, v in (whole | change).items() if v is not None}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            MllmForConditionalGeneration.from_pretrained(tmp_path)
    save_file(whole, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_pooling": "max"}))
    with pytest.raises(ConfigError, match=r"does not know .vision_pooling: max"):
        MllmForConditionalGeneration.from_pretrained(tmp_path)
    tied = config | {"tie_word_embeddings": True, "text_config": config["text_config"] | {"tie_word_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(tied))
    with pytest.raises(CheckpointError, match="ties the output head"):
        MllmForConditionalGeneration.from_pretrained(tmp_path)


HUB_LOST: dict[str, tuple[dict[str, Any], str]] = {
    "a patch taken for a class token": ({"vision_feature_select_strategy": "default"}, "drops the first token"),
    "another way of shrinking": ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio 'square' is not supported"),
    "tiles of another size": ({"image_grid_pinpoints": [[28, 30]]}, "no multiple of the encoder's 28"),
    "an unread setting": ({"spatial_pool_mode": "max"}, "does not know .spatial_pool_mode"),
    "an unknown activation": ({"projector_hidden_act": "mish"}, "activation 'mish' is not supported"),
}


def test_settings_of_tiled_checkpoints_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    model, reader = onevision_checkpoint()
    model.save_pretrained(tmp_path / "one")
    reader.save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "config.json"
    config = json.loads(file.read_text())
    for changes, message in HUB_LOST.values():
        file.write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=message):
            convert(str(tmp_path / "one"), tmp_path / "ours")
    file.write_text(json.dumps(config))
    convert(str(tmp_path / "one"), tmp_path / "ours")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = MllmProcessor.from_pretrained(tmp_path / "ours").apply_chat_template(said, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    convert(str(tmp_path / "one"), tmp_path / "other", chat_template="vicuna")
    text = MllmProcessor.from_pretrained(tmp_path / "other").apply_chat_template(said, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nwhat? ASSISTANT:")
    theirs, reader = internvl_checkpoint()
    theirs.save_pretrained(tmp_path / "intern")
    reader.image_processor.save_pretrained(tmp_path / "intern")
    with pytest.raises(CheckpointError, match="needs its tokenizer, which names the tokens around a picture"):
        convert(str(tmp_path / "intern"), tmp_path / "again")


def test_a_language_model_whose_prompts_are_not_known_needs_a_template(tmp_path: Path) -> None:
    """Vicuna's format for every language model would be a wrong question, and nobody would be told."""
    from transformers import MistralConfig

    vision, text, pixels, patch = SIZES["small"]
    tokenizer = tiny_tokenizer(template=None)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=pixels, patch_size=patch, projection_dim=16, **vision),
        text_config=MistralConfig(vocab_size=320, num_key_value_heads=1, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "theirs")
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="--chat-template"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    convert(str(tmp_path / "theirs"), tmp_path / "ours", chat_template="chatml")
