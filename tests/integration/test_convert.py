"""Do known checkpoints come in with nothing changed?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mllm.errors import CheckpointError
from mllm.models.foreign.conversion import convert, recognise
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
        want = theirs.generate(**expected, **settings)
        assert torch.equal(ours.generate(**given, **settings), want)
        assert torch.equal(direct.generate(**given, **settings), want)
    blind = theirs(
        input_ids=expected["input_ids"],
        attention_mask=expected["attention_mask"],
        pixel_values=-expected["pixel_values"],
    )
    assert (blind.logits - reference).abs().max() > 1e-2, "the pictures must matter for this test to mean anything"


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
        text = llm.get_input_embeddings()(inputs["input_ids"][:, processor.num_image_tokens :])
        expected = llm(inputs_embeds=torch.cat([visual, text], dim=1)).logits
        got = model(**inputs).logits[..., :320]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.save({"model": print}, folder / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(CheckpointError, match="refused, it is not a plain tensor file"):
        convert(str(folder), tmp_path / "again")
