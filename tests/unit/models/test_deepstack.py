"""Are visual tokens added behind the language model's first layers as transformers' Qwen3-VL adds them, in training and in answers?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel, Qwen3VLVisionPatchMerger

from mllm.connectors.build import build_connector
from mllm.errors import AlignmentError, ConfigError, UnavailableError
from mllm.models.build import build_config
from mllm.models.levels import split_levels
from mllm.serve.vllm.refusals import refuse_unserved
from mllm.types import EncoderInfo, ImageSpec, VisionFeatures
from tests.helpers import TINY_LLM, picture, tiny_model, tiny_spec

SIGLIP2 = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIGLIP2 |= {"num_attention_heads": 2, "num_patches": 16, "patch_size": 8}
QWEN3: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
QWEN3 |= {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
STACKED: dict[str, Any] = {
    "encoders": {"semantic": {"type": "hf", "architecture": SIGLIP2, "layers": [1, 2, -1]}},
    "connector": {"type": "deepstack", "levels": 2, "each": {"type": "pixel_shuffle"}},
    "views": {"type": "native", "max_patches": 40, "newlines": True},
}


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = str(tmp_path_factory.mktemp("deepstack"))
    language = {"config": {"model_type": "qwen3", **QWEN3}, "tokenizer": folder}
    return tiny_model(folder, **STACKED, language_model=language)


@pytest.fixture(scope="module")
def inputs(stacked: tuple[Any, Any]) -> Any:
    pictures = [[picture(1, size=(60, 30))], [picture(2, size=(20, 50)), picture(3, size=(90, 20))], []]
    texts = ["<image> which ", "<image> a <image> question ", " none "]
    return stacked[1](text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")


@torch.no_grad()
def test_hidden_states_are_those_of_qwen3_vl(stacked: tuple[Any, Any], inputs: Any) -> None:
    model = stacked[0].model
    vocabulary = model.get_input_embeddings().num_embeddings
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    theirs = Qwen3VLTextModel(Qwen3VLTextConfig(**{**QWEN3, "vocab_size": vocabulary}, rope_parameters=rope)).eval()
    theirs.load_state_dict(model.language_model.state_dict())
    wide = model.get_image_features(**{k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes")})
    tokens, levels = split_levels(wide.pooler_output, 2)
    assert len(levels) == 2 and all(level.shape == tokens.shape for level in levels)
    embeddings = model.merge_images(inputs["input_ids"], model.embed_tokens(inputs["input_ids"]), tokens)
    mask, places = inputs["attention_mask"], (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    options: dict[str, Any] = {"attention_mask": mask, "position_ids": places}
    seen = inputs["input_ids"] == model.config.image_token_id
    wanted = theirs(
        inputs_embeds=embeddings, visual_pos_masks=seen, deepstack_visual_embeds=list(levels), **options
    ).last_hidden_state
    found = model(**{**inputs, **options}).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=0)
    flat = theirs(inputs_embeds=embeddings, **options).last_hidden_state
    assert float((flat - wanted)[real].abs().max()) > 0.1, "the levels move nothing, so nothing was compared"


@torch.no_grad()
def test_a_level_goes_through_qwen3_vls_merger() -> None:
    info = EncoderInfo(image=ImageSpec(height=32, width=48), grid=(4, 6), width=24)
    projector = {"depth": 2, "hidden": "1x", "norm_before": "layer_norm"}
    spec = {"type": "deepstack", "levels": 1, "each": {"type": "pixel_shuffle", "projector": projector}}
    part: Any = build_connector(spec, {"e": info}, 20).parts[1]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    sizes = Qwen3VLVisionConfig(hidden_size=12, out_hidden_size=20, spatial_merge_size=2)
    merger = Qwen3VLVisionPatchMerger(sizes, use_postshuffle_norm=True)
    norm, first, _, second = part.projector
    norm.eps = merger.norm.eps
    for ours, theirs in ((norm, merger.norm), (first, merger.linear_fc1), (second, merger.linear_fc2)):
        ours.load_state_dict(theirs.state_dict())
    patches = torch.randn(2, 24, 12)
    blocks = patches.view(2, 2, 2, 3, 2, 12).transpose(2, 3).reshape(-1, 12)  # Qwen lists patches block by block
    found = part.view_tokens({"e": VisionFeatures(patches, (4, 6))})
    torch.testing.assert_close(found.flatten(0, 1), merger(blocks), atol=1e-5, rtol=0)


def test_layers_that_are_computed_again_add_the_same_whatever_ran_between(
    stacked: tuple[Any, Any], inputs: Any
) -> None:
    model, processor = stacked
    other = processor(text=["<image> q"], images=[picture(7, size=(40, 40))], return_tensors="pt")
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), torch.tensor(-100))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        model(**other, use_cache=False)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    parts = [name for name in plain if ".parts." in name]
    assert len({name.split(".parts.")[1][0] for name in parts}) == 3 and all(plain[name].any() for name in parts)


@torch.no_grad()
def test_answers_from_the_cache_are_those_without(stacked: tuple[Any, Any], inputs: Any) -> None:
    model = stacked[0]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), cached)


def test_a_stack_that_cannot_stand_is_refused(stacked: tuple[Any, Any], tmp_path: Any) -> None:
    model = stacked[0]

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            build_config(tiny_spec(str(tmp_path), **{**STACKED, **changes}))

    named = {"semantic": {**STACKED["encoders"]["semantic"], "layers": [0, 1, 2, -1]}}
    one = {**STACKED["connector"], "levels": 1}
    refused(r"1 levels take 2 layers of encoder 'semantic', which names 4", encoders=named, connector=one)
    short = {"config": {"model_type": "qwen3", **QWEN3, "num_hidden_layers": 2}}
    refused(r"2 levels need a language model of at least 3 layers; this one has 2", language_model=short)
    with pytest.raises(AlignmentError, match=r"192 wide and the language model's 64.*only the first part"):
        model.model.merge_images(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 64), torch.zeros(1, 192))


def test_a_decoder_that_keeps_arguments_from_its_layers_is_told(
    stacked: tuple[Any, Any], inputs: Any, monkeypatch: Any
) -> None:
    language = stacked[0].model.language_model
    whole = type(language).forward
    monkeypatch.setattr(
        type(language), "forward", lambda self, *a, visual_levels=None, **kwargs: whole(self, *a, **kwargs)
    )
    with pytest.raises(ConfigError, match="Qwen3Model does not hand further arguments to its layers"):
        stacked[0](**inputs)


def test_vllm_refuses_what_its_language_models_have_no_place_for(stacked: tuple[Any, Any], tmp_path: Any) -> None:
    with pytest.raises(
        UnavailableError, match=r"behind 2 layers of its language model \(connector deepstack\).*mllm chat"
    ):
        refuse_unserved(stacked[0].config)
    switched = {"config": dict(TINY_LLM), "modality_switch": True}
    with pytest.raises(UnavailableError, match=r"modality_switch.*model\.generate"):
        refuse_unserved(build_config(tiny_spec(str(tmp_path), language_model=switched)))
    refuse_unserved(build_config(tiny_spec(str(tmp_path))))
