"""Does a model that sees pictures at their own aspect ratio, with an encoder or without, train, answer and come back from disk?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.data.collate import collate, collate_packed
from mllm.errors import ConfigError
from mllm.models.build import build_config
from mllm.models.modality import ModalitySwitch
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.processing.processor import MllmProcessor
from tests.golden.fill import check, fill_all, load
from tests.helpers import TINY_LLM, picture, samples_of_unlike_sizes, tiny_model, tiny_spec

SIGLIP2 = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIGLIP2 |= {"num_attention_heads": 2, "num_patches": 16, "patch_size": 8}
QWEN = {"model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
QWEN |= {"out_hidden_size": 24, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
MARKS = {"begin": "<vision>", "row": "<vrow_sep>", "end": "</vision>"}
KINDS: dict[str, dict[str, Any]] = {
    "siglip2": {
        "encoders": {"semantic": {"type": "hf", "architecture": SIGLIP2}},
        "connector": {"type": "pixel_shuffle", "factor": 2},
        "views": {"type": "native", "max_patches": 40, "newlines": True},
    },
    "deepstack": {
        "encoders": {"semantic": {"type": "hf", "architecture": SIGLIP2, "layers": [1, -1]}},
        "connector": {"type": "deepstack", "levels": 1, "each": {"type": "pixel_shuffle"}},
        "views": {"type": "native", "max_patches": 40, "newlines": True},
    },
    "qwen_vl": {
        "encoders": {"tower": {"type": "qwen_vl", "architecture": QWEN}},
        "connector": {"type": "linear"},
        "views": {"type": "native", "rule": "qwen", "max_patches": 20},
    },
    "eve": {
        "encoders": {"eve": {"type": "eve", "width": 16, "patch_size": 7, "num_heads": 2, "image_size": 56}},
        "connector": {"type": "mlp", "depth": 2},
        "views": {"type": "native", "rule": "qwen", "max_patches": 20},
    },
    "solo": {
        "encoders": {},
        "connector": {"type": "linear"},
        "views": {"type": "native", "rule": "solo", "patch_size": 8, "max_side": 48, "marks": MARKS},
    },
    "evev2": {
        "encoders": {"eve": {"type": "patch_conv", "width": 16, "patch_size": 8, "image_size": 32}},
        "connector": {"type": "pixel_shuffle", "factor": 2, "projector": {"depth": 1}},
        "views": {"type": "native", "rule": "evev2", "max_side": 48, "newlines": True, "opening": True},
        "language_model": {"config": dict(TINY_LLM), "modality_switch": True},
    },
}
"""width × height of each sample's pictures"""


@pytest.fixture(scope="module", params=list(KINDS))
def native(request: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("native")
    changes = dict(KINDS[request.param])
    if "language_model" in changes:
        changes["language_model"] = {**changes["language_model"], "tokenizer": str(folder)}
    model, processor = tiny_model(folder, **changes)
    if model.config.modality_switch:  # copies at the start: told apart here
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, ModalitySwitch):
                    for parameter in module.visual.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, processor


def test_samples_give_the_same_loss_alone_padded_and_packed_and_all_parts_learn(native: tuple[Any, Any]) -> None:
    model, processor = native
    encoded = [encode_sample(processor, sample) for sample in samples_of_unlike_sizes()]
    assert [sample.num_images for sample in encoded] == [1, 0, 2, 1]
    counts = torch.tensor([sample.num_supervised for sample in encoded], dtype=torch.float32)
    with torch.no_grad():
        alone = torch.tensor([float(model(**collate([sample], pad_token_id=0).inputs).loss) for sample in encoded])
        wanted = float((alone * counts).sum() / counts.sum())
        assert abs(float(model(**collate(encoded, pad_token_id=0).inputs).loss) - wanted) < 1e-5
        longest = sum(map(len, encoded[:3]))
        packed = collate_packed([encoded[:3], encoded[3:]], max_length=longest, pad_token_id=0)
        assert abs(float(model(**packed.inputs, skip_logits=True, use_cache=False).loss) - wanted) < 1e-5
    touched = []
    model.train()
    for batch in (encoded, [encoded[1]]):
        model.zero_grad()
        model(**collate(batch, pad_token_id=0).inputs).loss.backward()
        touched.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    model.eval()
    assert touched[0] == touched[1], "ranks with and without pictures would reduce different gradients"
    assert touched[0] == {name for name, _ in model.named_parameters()}


def test_batches_answer_like_single_prompts_and_the_text_is_that_of_training(native: tuple[Any, Any]) -> None:
    model, processor = native
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [f"{'<image>' * len(sample.images)} {'which ' * k}" for k, sample in enumerate(samples_of_unlike_sizes())]
    images = [sample.images for sample in samples_of_unlike_sizes()]
    batch = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
    together = model.generate(**batch, num_beams=2, **options)[:, batch["input_ids"].shape[1] :]
    for row, (text, pictures) in enumerate(zip(prompts, images)):
        single = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
        alone = model.generate(**single, num_beams=2, **options)[:, single["input_ids"].shape[1] :]
        assert alone[0].tolist() == together[row].tolist(), row
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": images[0][0]}, {"type": "text", "text": " which "}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    trained = encode_sample(processor, samples_of_unlike_sizes()[0]).input_ids
    prompt = chat["input_ids"][0]
    assert torch.equal(prompt, trained[: len(prompt)])


def test_it_comes_back_from_disk(native: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = native
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reread = (
        MllmForConditionalGeneration.from_pretrained(tmp_path).eval(),
        MllmProcessor.from_pretrained(tmp_path),
    )
    assert reread.layout_key == processor.layout_key
    inputs = reread(text=["<image> q"], images=[picture(1, size=(90, 30))], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_solo_writes_its_marks_between_the_rows(tmp_path: Path) -> None:
    _, processor = tiny_model(tmp_path, **KINDS["solo"])
    ids = processor(text=["<image> <vision>"], images=[picture(1, size=(24, 16))], return_tensors="pt")["input_ids"][0]
    begin, row, end = (processor.tokenizer.convert_tokens_to_ids(text) for text in MARKS.values())
    patch = processor.image_token_id
    assert ids[:9].tolist() == [begin, *[patch] * 3, row, *[patch] * 3, end]


def test_a_native_view_is_refused_where_it_cannot_be_had(tmp_path: Path) -> None:
    from tests.helpers import TINY_CLIP

    with pytest.raises(ConfigError, match=r"model.views: native needs encoders.*'semantic' takes 28 × 28 pixels only"):
        build_config(tiny_spec(str(tmp_path), views={"type": "native"}))
    spec = {**KINDS["siglip2"], "connector": {"type": "average_pool", "grid": [2, 2]}}
    with pytest.raises(
        ConfigError, match=r"average_pool takes one grid only, not views native; use deepstack, linear, mlp"
    ):
        build_config(tiny_spec(str(tmp_path), **spec))
    with pytest.raises(ConfigError, match="modality_switch: layer 0 of this decoder has no post_attention_layernorm"):
        odd = {"config": {"model_type": "phi", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "intermediate_size": 32, "vocab_size": 300}, "modality_switch": True}  # fmt: skip
        config = build_config(
            tiny_spec(str(tmp_path), encoders={"a": TINY_CLIP}, connector={"type": "mlp"}, language_model=odd)
        )
        MllmForConditionalGeneration(config)


@torch.no_grad()
def test_the_modality_switch_is_the_authors() -> None:
    meta, given, expected = load("tests/golden/evev2_modality_switch.json")
    sizes = meta["ctor"]
    switch = ModalitySwitch(*(torch.nn.Linear(sizes["in_features"], sizes["out_features"]) for _ in range(2)))
    switch.load_state_dict({key: torch.from_numpy(value) for key, value in fill_all(meta).items()})
    x, mask = (torch.from_numpy(given[f"input.{name}"]) for name in ("x", "mask"))
    check(meta, expected, {"output.y": switch(x, mask).numpy()})
    switch.places.mask = mask[..., 0].bool()
    check(meta, expected, {"output.y": switch(x).numpy()})
    assert torch.equal(switch(x[:, :1]), switch.text(x[:, :1])), "a step after the prompt holds no picture"


@torch.no_grad()
def test_copied_weights_change_nothing_until_they_learn(tmp_path: Path) -> None:
    changes = {**KINDS["evev2"], "language_model": {"config": dict(TINY_LLM), "tokenizer": str(tmp_path)}}
    plain, processor = tiny_model(tmp_path, **changes)
    changes["language_model"] = {**changes["language_model"], "modality_switch": True}
    switched, _ = tiny_model(tmp_path, **changes)
    switched.model.language_model.load_state_dict(
        {
            other: value
            for name, value in plain.model.language_model.state_dict().items()
            for other in switched.model.language_model.state_dict()
            if other.replace(".text.", ".").replace(".visual.", ".") == name
        }
    )
    switched.lm_head.load_state_dict(plain.lm_head.state_dict())
    switched.model.multi_modal_projector.load_state_dict(plain.model.multi_modal_projector.state_dict())
    switched.model.vision_tower.load_state_dict(plain.model.vision_tower.state_dict())
    inputs = processor(text=["<image> q"], images=[picture(1, size=(90, 30))], return_tensors="pt")
    torch.testing.assert_close(switched(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=1e-5)
