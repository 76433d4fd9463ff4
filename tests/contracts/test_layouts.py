"""Do processor, model and vLLM give a visual the same tokens, for every connector, every way of looking and any size?"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from mllm.connectors import CONNECTORS
from mllm.connectors.build import build_connector, connector_config
from mllm.errors import ConfigError
from mllm.models.configuration_mllm import MllmConfig
from mllm.processing.chat import count_tokens, encode_sample
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.layout import LayoutRules, layout_rules
from mllm.processing.processor import MllmProcessor
from mllm.processing.views import VIEWS
from mllm.testing.connectors import sample_features
from mllm.types import IMAGE_MARK, Sample, Turn, VisionFeatures
from tests.helpers import picture, tiny_tokenizer

SIZES = [(1, 1), (1, 4000), (4000, 1), (64, 64), (37, 53), (53, 37), (16, 24), (7, 100), (240, 180), (11, 33)]
"""height × width"""
KINDS = [spec for name in VIEWS for spec in VIEWS.get(name).tiny()]


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return [picture(k, size=(width, height)) for k, (height, width) in enumerate(SIZES)]


def of_vllm(processor: MllmProcessor, config: MllmConfig, inputs: Any) -> list[int]:
    """Tokens of every image in the prompt, as vLLM's processor of the served model expands it."""
    pytest.importorskip("vllm")
    from vllm.multimodal.inputs import MultiModalKwargsItems

    from mllm.serve.vllm.processing import MllmMultiModalProcessor

    served: Any = object.__new__(MllmMultiModalProcessor)
    served.info = SimpleNamespace(
        get_hf_processor=lambda: processor,
        get_hf_config=lambda: config,
        rules=config.layout_rules(),
        num_short_tokens=None,
    )
    given = MultiModalKwargsItems.from_hf_inputs(inputs, served._get_mm_fields_config(inputs, {}))
    assert [len(row["pixel_values"].data) for row in given["image"]] == (
        [layout.rows_of(next(iter(config.encoders))) for layout in served.info.rules.layouts(SIZES)]
        if served.info.rules.needs_size
        else [served.info.rules.view.frames if served.info.rules.view.frames > 1 else 3] * len(SIZES)
    )
    (update,) = served._get_prompt_updates(None, {}, given)
    return [len(update.replacement(k)) for k in range(len(SIZES))]


def native_features(encoders: dict[str, Any], layouts: list[Any]) -> dict[str, VisionFeatures]:
    """Random features of visuals that have grids of their own."""
    grids = tuple(layout.patches for layout in layouts)
    count = sum(rows * columns for rows, columns in grids)
    generator = torch.Generator().manual_seed(7)
    return {
        name: VisionFeatures(torch.randn(1, count, info.width, generator=generator), (1, count), grids=grids)
        for name, info in encoders.items()
    }


@pytest.mark.parametrize("views", KINDS, ids=lambda spec: " ".join(map(str, spec.values())))
@pytest.mark.parametrize("name", list(CONNECTORS))
def test_processor_model_and_vllm_agree_on_every_visual(name: str, views: dict[str, Any], pictures: list[Any]) -> None:
    connector_spec, encoders, width = CONNECTORS.get(name).tiny()
    native = views["type"] == "native"
    if native:  # such encoders take patches
        for key, info in encoders.items():
            encoders[key] = info.model_copy(update={"image": info.image.model_copy(update={"patch": 4})})
        if CONNECTORS.get(name).native_cell(connector_config(connector_spec)) is None:
            with pytest.raises(ConfigError, match=f"model.connector: {name} takes one grid only"):
                layout_rules(SimpleNamespace(connector=connector_spec, views=views), encoders)
            return
    view = CONNECTORS.get(name).layout(connector_config(connector_spec), encoders)
    of_videos = view.shown > 1 or view.fast is not None
    video = {"frames": 2} if of_videos else None
    if of_videos and views["type"] != "single":
        with pytest.raises(ConfigError, match=r"videos that are seen once; leave model\.views"):
            layout_rules(SimpleNamespace(connector=connector_spec, views=views, video=video), encoders)
        return
    config = MllmConfig(
        text_config=LlamaConfig(hidden_size=width, num_attention_heads=1, vocab_size=300),
        encoders={key: {"type": "raw_patches", "info": info.model_dump(mode="json")} for key, info in encoders.items()},
        connector=connector_spec,
        views=views,
        video=video,
    )
    written = MllmImageProcessor(
        {key: info.image for key, info in encoders.items()},
        layout=config.view_layout(),
        views=config.views,
        video=video,
    ).to_dict()
    images = MllmImageProcessor(
        **{k: v for k, v in json.loads(json.dumps(written)).items() if k != "image_processor_type"}
    )
    processor = MllmProcessor(images, tiny_tokenizer())
    rules: LayoutRules = config.layout_rules()
    layouts = [rules.layout(size) for size in SIZES]
    expected = [layout.num_tokens for layout in layouts]
    assert min(layout.num_placeholders for layout in layouts) > 0
    assert max(expected) <= rules.layout(rules.largest()).num_tokens

    inputs = processor(text=["<image>"] * len(pictures), images=[[image] for image in pictures])
    placeholder = processor.image_token_id
    assert [sum(i == placeholder for i in row) for row in inputs["input_ids"]] == expected
    assert processor._get_num_multimodal_tokens(SIZES)["num_image_tokens"] == expected
    sample = Sample("s", [Turn("user", IMAGE_MARK * len(pictures) + " q"), Turn("assistant", "a")], pictures)
    encoded = encode_sample(processor, sample)
    together = [rules.layout(size, rules.share(len(SIZES))) for size in SIZES]  # of one sample
    assert int((encoded.input_ids == placeholder).sum()) == sum(layout.num_tokens for layout in together)
    assert encoded.num_images == len(SIZES)
    assert len(encoded.input_ids) == count_tokens(processor, sample, where="s")
    views_given = sum(layout.num_views for layout in layouts)
    for encoder, key in processor.pixel_keys.items():
        rows = sum(layout.rows_of(encoder) for layout in layouts)
        assert len(inputs[key]) == rows
        assert len(encoded.pixels[key]) == sum(layout.rows_of(encoder) for layout in together)

    connector = build_connector(config.connector, encoders, width).eval()
    if rules.newlines:
        connector.add_newline()
    if rules.opening:
        connector.add_opening()
    text = torch.randn(len(SIZES), width, generator=torch.Generator().manual_seed(1))
    features = native_features(encoders, layouts) if native else None
    features = features or sample_features(type(connector), connector.config, encoders, views_given)
    with torch.no_grad():
        tokens = connector(features, None, text, layouts)
    assert tuple(tokens.shape) == (sum(expected), width * (1 + rules.view.levels))
    if rules.needs_size:
        last = native_features(encoders, layouts) if native else None
        last = last or sample_features(type(connector), connector.config, encoders, views_given)
        for feature in last.values():
            if feature.grids is not None:
                count = feature.grids[-1][0] * feature.grids[-1][1]
                feature.tokens, feature.grids = feature.tokens[:, -count:], feature.grids[-1:]
                continue
            feature.tokens = feature.tokens[-layouts[-1].num_views :]
            feature.attention = None if feature.attention is None else feature.attention[-layouts[-1].num_views :]
        with torch.no_grad():
            alone = connector(last, None, text[-1:], layouts[-1:])
        torch.testing.assert_close(alone, tokens[-expected[-1] :], atol=1e-5, rtol=1e-5)
    if view.repeats == 1:  # the server refuses others
        assert of_vllm(processor, config, inputs) == expected
