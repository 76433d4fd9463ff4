"""Does a language model with several position axes answer as in transformers' own model: alone, padded, packed and step by step?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForImageTextToText
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from mllm.data.collate import collate, collate_packed
from mllm.errors import ConfigError, UnavailableError
from mllm.eval.generators.kept_pictures import KeptPictures
from mllm.models.build import build_config
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.models.position_axes import SERVED_AS, told_to_vllm
from mllm.processing.chat import encode_sample
from mllm.processing.frames import VideoSpec
from mllm.processing.layout import VIDEO_TIMES, LayoutRules
from mllm.processing.processor import APART
from mllm.serve.vllm.positions import PositionsOfPrompts
from mllm.serve.vllm.refusals import refuse_unserved
from mllm.types import Video
from tests.helpers import TINY_CLIP, TINY_LLM, picture, samples_of_unlike_sizes, tiny_model, tiny_spec

SIGLIP2 = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIGLIP2 |= {"num_attention_heads": 2, "num_patches": 16, "patch_size": 8}
NATIVE: dict[str, Any] = {
    "encoders": {"semantic": {"type": "hf", "architecture": SIGLIP2}},
    "connector": {"type": "pixel_shuffle"},
    "views": {"type": "native", "max_patches": 40},
}
FRAMES: dict[str, Any] = {"encoders": {"semantic": dict(TINY_CLIP)}, "connector": "linear"}
SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GLM_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
HALF = {"partial_rotary_factor": 0.5}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({}, {"mrope_section": [2, 3, 3]}),
    "qwen2_5_vl": ({}, {"mrope_section": [2, 3, 3]}),
    "qwen3_vl": ({}, {"mrope_section": [4, 2, 2]}),
    "qwen3_vl_moe": (MOE, {"mrope_section": [4, 2, 2]}),
    "qwen3_5": (LINEAR, {"mrope_section": [2, 1, 1], **HALF}),
    "qwen3_5_moe": ({**LINEAR, **MOE, "shared_expert_intermediate_size": 32}, {"mrope_section": [2, 1, 1], **HALF}),
    "glm4v": ({}, {"mrope_section": [2, 1, 1], **HALF}),
    "glm4v_moe": ({**GLM_MOE, "n_shared_experts": 1, **HALF}, {"mrope_section": [2, 1, 1], **HALF}),
    "glm_ocr": ({}, {"mrope_section": [4, 2, 2]}),
}
"""Kind → (sizes of its own, rope parameters)."""
ALWAYS = ("qwen2_vl", "qwen3_vl", "qwen3_5")


def language(kind: str) -> dict[str, Any]:
    more, rope = KINDS[kind]
    rope = {"rope_type": "default", "rope_theta": 100.0, **rope}
    return {"model_type": f"{kind}_text", **SIZES, **more, "rope_parameters": rope}


def wide(model: Any) -> Any:
    """Weights drawn so that positions move the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim > 1:
                spread = 2.0 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def ours(folder: Path, kind: str, **changes: Any) -> tuple[Any, Any]:
    spec = {"config": language(kind), "tokenizer": str(folder)} | changes.pop("language_model", {})
    model, processor = tiny_model(folder, language_model=spec, **{**NATIVE, **changes})
    return wide(model), processor


def theirs(model: Any, kind: str, tokens: Any) -> Any:
    """transformers' whole model with our language model's weights; its tower says what ours and the connector said."""
    number = model.config.image_token_id
    ids = {"image_token_id": number, "video_token_id": number + 1, "vision_start_token_id": 3, "vision_end_token_id": 4}
    ids |= {"image_start_token_id": 3, "image_end_token_id": 4}
    vision = {"spatial_merge_size": 2, "depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"embed_dim": 32}
    vision |= {"tokens_per_second": 2, "deepstack_visual_indexes": []}
    made = CONFIG_MAPPING[kind](text_config=model.config.text_config.to_dict(), vision_config=vision, **ids)
    whole = AutoModelForImageTextToText.from_config(made).eval()
    whole.model.language_model.load_state_dict(model.model.language_model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    joined = torch.cat(list(tokens)).flatten(0, -2)
    whole.model.visual.forward = lambda *_, **__: BaseModelOutputWithDeepstackFeatures(
        pooler_output=joined, deepstack_features=[]
    )
    return whole


def pixels_of(inputs: Any) -> dict[str, Tensor]:
    return {key: inputs[key] for key in ("pixel_values", "image_sizes", "video_times") if key in inputs}


def visual_inputs(model: Any, inputs: Any) -> dict[str, Any]:
    """What transformers' models are told of the same pictures."""
    layouts = model.model.visual_layouts(inputs["image_sizes"])
    return {
        "pixel_values": torch.zeros(1),
        "image_grid_thw": torch.tensor([[1, *layout.patches] for layout in layouts]),
        "mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).int(),
    }


def prompts(processor: Any, side: str = "left") -> Any:
    images = [[picture(1, size=(60, 30))], [picture(2, size=(20, 50)), picture(3, size=(90, 20))], []]
    texts = ["<image> which ", "<image> a <image> q ", "none"]
    return processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS]
)
@torch.no_grad()
def test_logits_and_answers_are_those_of_transformers(kind, tmp_path):
    model, processor = ours(tmp_path, kind)
    inputs = prompts(processor)
    tokens = model.model.get_image_features(**pixels_of(inputs)).pooler_output
    whole, told = theirs(model, kind, tokens), visual_inputs(model, inputs)
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    found, wanted = model(**inputs).logits, whole(**text, **told).logits
    assert float((found - wanted)[real].abs().max()) < 1e-5
    right = prompts(processor, "right")
    assert float((model(**right).logits[right["attention_mask"].bool()] - wanted[real]).abs().max()) < 1e-4
    embedded = model.model.merge_images(inputs["input_ids"], model.model.embed_tokens(inputs["input_ids"]), tokens)
    flat = model.lm_head(
        model.model.language_model(inputs_embeds=embedded, attention_mask=text["attention_mask"]).last_hidden_state
    )
    assert float((flat - wanted)[real].abs().max()) > 0.05, "positions move nothing, so nothing was compared"
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": 2}
    never = [model.config.image_token_id, *model.config.unassigned_ids]
    answer = model.generate(**inputs, **options)
    known = whole.generate(**text, **told, **options, suppress_tokens=never)
    assert torch.equal(answer.sequences, known.sequences)
    assert float((torch.stack(answer.logits) - torch.stack(known.logits)).abs().max()) < 1e-5


@torch.no_grad()
def test_clips_stand_in_time_as_transformers_puts_them(tmp_path):
    """By their seconds, where they are of Qwen2.5-VL's 2 positions a second and no longer in time than in space."""
    video = {"frames": 3, "positions_per_second": 2.0}
    model, processor = ours(tmp_path, "qwen2_5_vl", views=None, video=video, **FRAMES)
    film = Video([picture(k) for k in range(3)], fps=2)
    inputs = processor(text=["a <video> b"], videos=[film], return_tensors="pt")
    tokens = model.model.get_image_features(**pixels_of(inputs)).pooler_output
    whole = theirs(model, "qwen2_5_vl", tokens)
    visual = inputs["input_ids"] == model.config.image_token_id
    ids = inputs["input_ids"].masked_fill(visual, model.config.image_token_id + 1)
    told = {"pixel_values_videos": torch.zeros(1), "video_grid_thw": torch.tensor([[3, 8, 8]])}
    told |= {"second_per_grid_ts": torch.tensor([0.5]), "mm_token_type_ids": 2 * visual.int()}
    assert int(visual.sum()) == 3 * 16
    wanted = whole(input_ids=ids, **told).logits
    assert float((model(**inputs).logits - wanted).abs().max()) < 1e-5
    slower = {**inputs, "video_times": 2 * inputs["video_times"]}
    assert float((model(**slower).logits - wanted).abs().max()) > 0.01, "times move nothing"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: Any) -> tuple[Any, Any]:
    return ours(tmp_path_factory.mktemp("qwen"), "qwen2_vl")


def test_packed_samples_learn_what_they_learn_alone(qwen):
    model, processor = qwen
    samples = [encode_sample(processor, one) for one in samples_of_unlike_sizes()]
    alone = collate(samples, pad_token_id=0).inputs
    length = sum(len(sample) for sample in samples) + 5
    packed = collate_packed([samples], max_length=length, pad_token_id=0).inputs
    model.zero_grad()
    first = model(**alone, use_cache=False).loss
    first.backward()
    gradient = model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    second = model(**packed, use_cache=False, skip_logits=True).loss
    second.backward()
    assert float((first - second).detach().abs()) < 1e-5
    again = model.model.language_model.layers[0].self_attn.q_proj.weight.grad
    assert float((gradient - again).abs().max()) < 1e-5 * float(gradient.abs().max()) + 1e-6
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        model.train().zero_grad()
        model(**packed, use_cache=False, skip_logits=True).loss.backward()
        assert float((gradient - model.model.language_model.layers[0].self_attn.q_proj.weight.grad).abs().max()) < 1e-5
    finally:
        model.eval().gradient_checkpointing_disable()


@torch.no_grad()
def test_a_cache_goes_on_behind_pictures_and_takes_more_of_them(qwen):
    model, processor = qwen
    inputs = prompts(processor)
    row = processor(
        text=["<image> a <image> q "],
        images=[[picture(2, size=(20, 50)), picture(3, size=(90, 20))]],
        return_tensors="pt",
    )
    wanted = model(**row).logits
    places = (row["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    cut = next(k for k in range(places[0], len(row["input_ids"][0])) if k not in places) + 1
    layouts = model.model.visual_layouts(row["image_sizes"])
    pixels = row["pixel_values"].split([layout.rows_of("semantic") for layout in layouts])
    start = model(
        input_ids=row["input_ids"][:, :cut], pixel_values=pixels[0], image_sizes=row["image_sizes"][:1], use_cache=True
    )
    rest = model(
        input_ids=row["input_ids"][:, cut:-1],
        pixel_values=pixels[1],
        image_sizes=row["image_sizes"][1:],
        past_key_values=start.past_key_values,
    )
    last = model(input_ids=row["input_ids"][:, -1:], past_key_values=rest.past_key_values)
    found = torch.cat([start.logits, rest.logits, last.logits], 1)
    assert float((found - wanted).abs().max()) < 1e-4
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))


SLOW = {**FRAMES, "views": None, "video": {"frames": 6}}
SLOW["connector"] = {"type": "slow_fast", "every": 1, "stride": 2, "least": 2}


@pytest.mark.parametrize("seen", ["native", "slow_fast"])
@torch.no_grad()
def test_pictures_kept_between_questions_stand_where_they_stood(seen, tmp_path):
    """With beams, too, and of a video with the slow tokens that its layers read."""
    model, processor = ours(tmp_path, "qwen2_vl", **(NATIVE if seen == "native" else SLOW))
    film = [Video([picture(k) for k in range(6)], fps=2)]
    told = {"text": ["a <video> b <image> c"], "videos": film, "images": [[picture(9)]], "return_tensors": "pt"}
    inputs = prompts(processor) if seen == "native" else processor(**told)
    kept = KeptPictures(64).encode(model, inputs)
    assert "image_features" in kept and "pixel_values" not in kept
    for options in ({}, {"num_beams": 2}):
        asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        assert torch.equal(model.generate(**kept, **asked), model.generate(**inputs, **asked))


@torch.no_grad()
def test_vllm_is_told_the_same_positions(qwen):
    """Also of a picture of which vLLM kept nothing but how it lies, since it has its tokens."""
    model, processor = qwen
    row = processor(
        text=["<image> a <image> q "],
        images=[[picture(2, size=(20, 50)), picture(3, size=(90, 20))]],
        return_tensors="pt",
    )
    wanted: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: wanted.append(kwargs["position_ids"]), with_kwargs=True
    )
    model(**row)
    hook.remove()
    served = PositionsOfPrompts()
    served.config, served.rules = model.config, model.model.rules
    items = [{"image_sizes": SimpleNamespace(data=size)} for size in row["image_sizes"]]
    features = [
        SimpleNamespace(modality="image", data=item, mm_position=SimpleNamespace(offset=offset))
        for offset, item in zip((0, 30), items, strict=True)
    ]
    found, ahead = served.get_mrope_input_positions(row["input_ids"][0].tolist(), features[::-1])
    assert torch.equal(found, wanted[0][1:, 0]) and ahead == int(found.max()) + 1 - found.shape[1] < 0
    film, text = LayoutRules(model.model.rules.view, model.model.rules.images, video=VideoSpec(frames=3)), [9, 9]
    served.rules = film
    times = {APART + VIDEO_TIMES: SimpleNamespace(data=torch.tensor([0, 500, -1]))}
    clip = SimpleNamespace(modality="video", data=times, mm_position=SimpleNamespace(offset=1))
    layout = film.video_layout(2)
    ids = [text[0], *[model.config.image_token_id] * layout.num_placeholders, text[1]]
    found, _ = served.get_mrope_input_positions(ids, [clip])
    frame = layout.num_placeholders // 2
    assert found[0].tolist()[: 1 + 2 * frame] == [0, *[1] * frame, *[2] * frame]


@pytest.mark.nightly
@torch.no_grad()
def test_a_step_behind_the_prompt_compiles_whole(qwen):
    model, processor = qwen
    start = model(**prompts(processor), use_cache=True)
    step = {"input_ids": torch.tensor([[9], [8], [7]]), "position_ids": torch.tensor([[30], [41], [9]])}
    cache = start.past_key_values
    wanted = model(**step, past_key_values=cache).logits
    cache.crop(cache.get_seq_length() - 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert float((compiled(**step, past_key_values=cache).logits - wanted).abs().max()) < 1e-5
    torch._dynamo.reset()


@torch.no_grad()
def test_as_text_all_axes_are_alike(tmp_path):
    model, processor = ours(tmp_path, "qwen3_vl", language_model={"positions": "text"})
    inputs = prompts(processor)
    tokens = model.model.get_image_features(**pixels_of(inputs)).pooler_output
    whole = theirs(model, "qwen3_vl", tokens)
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    told = visual_inputs(model, inputs) | {"position_ids": places.expand(3, -1, -1)}
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    assert float((model(**inputs).logits - whole(**text, **told).logits)[real].abs().max()) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    again = MllmForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.positions == "text" and torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe", "glm4v_moe"])
def test_the_text_part_of_what_transformers_saves_is_opened(kind, tmp_path):
    """Also of experts, which are stored in other forms than they are used in."""
    model, processor = ours(tmp_path, kind)
    theirs(model, kind, [torch.zeros(1, 64)]).save_pretrained(tmp_path / "published")
    processor.tokenizer.save_pretrained(tmp_path / "published")
    source = {"source": str(tmp_path / "published")}
    read, _ = tiny_model(tmp_path / "made", language_model=source, **NATIVE)
    known, found = (one.model.language_model.state_dict() for one in (model, read))
    assert known.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in known.items())
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    read.set_attn_implementation("eager")
    assert read.model.language_model.config is read.config.text_config
    assert read.model.language_model.layers[0].self_attn.config._attn_implementation == "eager"


LATER = {"model.language_model.": "model.language_model.", "model.visual.": "model.visual."}
FIRST = {"model.language_model.": "model.", "model.visual.": "visual."}
OTHER = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head": "language_model.lm_head",
}


@pytest.mark.parametrize("names", [LATER, FIRST, OTHER], ids=["model.language_model", "model", "language_model.model"])
def test_the_text_part_of_a_published_model_is_opened_by_each_of_its_names(names, tmp_path):
    model, processor = ours(tmp_path, "qwen2_vl")
    whole = theirs(model, "qwen2_vl", [torch.zeros(1, 64)])
    folder = tmp_path / "published"
    whole.config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    weights = whole.state_dict()
    assert any(name.startswith("model.visual.") for name in weights)
    save_file({_renamed(key, names): value for key, value in weights.items()}, folder / "model.safetensors")
    read, _ = tiny_model(tmp_path / "made", language_model={"source": str(folder)}, **NATIVE)
    assert read.config.text_config.model_type == "qwen2_vl_text" and read.config.positions == "grid"
    known, found = (one.model.language_model.state_dict() for one in (model, read))
    assert all(torch.equal(found[key], value) for key, value in known.items())
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def test_a_tied_head_stays_tied_through_source_and_disk(tmp_path):
    """Qwen2-VL's and Qwen2.5-VL's small models tie it, which only the whole model's config says."""
    model, processor = ours(tmp_path, "qwen2_5_vl")
    whole = theirs(model, "qwen2_5_vl", [torch.zeros(1, 64)])
    whole.config.tie_word_embeddings = True
    whole.lm_head.weight = whole.model.language_model.embed_tokens.weight
    whole.save_pretrained(tmp_path / "tied")
    processor.tokenizer.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    read, processor = tiny_model(tmp_path / "made", language_model={"source": str(tmp_path / "tied")}, **NATIVE)
    assert read.lm_head.weight is read.get_input_embeddings().weight
    read.save_pretrained(tmp_path / "saved")
    again = MllmForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    inputs = prompts(processor)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, read(**inputs).logits)


DRAWS = {"visual_head": {"type": "separate"}}


@pytest.mark.parametrize(
    ("config", "changes", "told"),
    [
        (
            TINY_LLM | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
            {},
            r"llama has no positions of several axes .mrope_section.*qwen2_vl_text",
        ),
        (
            TINY_LLM | {"model_type": "qwen2", "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
            {},
            "qwen2 has no positions",
        ),
        ({"model_type": "hunyuan_vl_text"}, {}, "hunyuan_vl_text is no causal language model.*qwen3_vl_text"),
        ({"model_type": "qwen2_vl_text", **SIZES}, {}, "do not say which channels they turn; give mrope_section"),
        (
            language("qwen2_vl") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 3]}},
            {},
            r"mrope_section is \[2, 2, 3\], expected three numbers that add up to 8",
        ),
        (TINY_LLM, {"positions": "grid"}, "positions: grid is for language models with several position axes.*llama has one"),
        (TINY_LLM, {"video": {"frames": 4, "positions_per_second": 2}}, "positions_per_second: 2, and this language model gives"),
        (language("qwen2_vl"), {"heads": DRAWS}, "a head that draws writes its tokens at one axis, and qwen2_vl_text has three"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_several_axes_says_so(config, changes, told, tmp_path):
    spec = {"config": config, "tokenizer": str(tmp_path)}
    spec |= {key: changes[key] for key in ("positions",) if key in changes}
    rest = {key: value for key, value in changes.items() if key not in ("positions",)}
    with pytest.raises(ConfigError, match=told):
        build_config(tiny_spec(str(tmp_path), language_model=spec, **rest))


@pytest.mark.parametrize("kind", [kind for kind, served in SERVED_AS.items() if served is None])
def test_language_models_that_were_not_tried_in_vllm_are_not_served(kind):
    config = MllmConfig(text_config=language(kind.removesuffix("_text")), connector={"type": "linear"})
    with pytest.raises(UnavailableError, match=rf"{kind}. has positions of several axes, and was not tried"):
        refuse_unserved(config)


@pytest.mark.parametrize("kind", list(KINDS))
def test_vllm_is_told_which_channels_take_turns(kind):
    """transformers' class knows it; vLLM lays the axes side by side unless the config says otherwise."""
    config = MllmConfig(text_config=language(kind)).text_config
    told_to_vllm(config)
    kept: Any = config.rope_parameters
    assert (
        kept["mrope_interleaved"] is kind.startswith("qwen3")
        and kept["mrope_section"] == KINDS[kind][1]["mrope_section"]
    )
    with torch.device("meta"):
        rotary: Any = AutoModel.from_config(config).rotary_emb
    axes = torch.arange(3.0)[:, None, None].repeat(1, 1, sum(kept["mrope_section"]))
    first, second = rotary.recomposition_frequencies(axes)[0, :2].tolist()
    assert (first != second) is kept["mrope_interleaved"]
