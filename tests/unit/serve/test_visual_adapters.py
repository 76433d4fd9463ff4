"""Is each picture of a batch encoded with the adapter of its own request, and with no other?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.processing.pixel_keys import PixelKeys
from mllm.serve.adapters import ADAPTER, adapter_rank, read_adapter
from mllm.serve.vllm.visual_adapters import VisualAdapters
from tests.helpers import TINY_CLIP, TINY_TIMM, tiny_model

TARGETS = {
    "tower": r".*(semantic\..*(q_proj|fc1)|spatial\..*qkv)",
    "both": r".*(language_model|semantic)\..*q_proj",
    "connector": r".*multi_modal_projector\..*(0|2)",
}


def write_adapter(model, folder, where, seed, **options):
    """A PEFT adapter with weights that matter; returns its folder."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=9, target_modules=where, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save_pretrained(folder)
    adapted.unload()
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Checkpoint folder, the folders of its adapters by number, and pixels of five pictures."""
    folder = tmp_path_factory.mktemp("adapted")
    model, processor = tiny_model(
        folder / "tokenizer", encoders={"semantic": dict(TINY_CLIP), "spatial": dict(TINY_TIMM)}, seed=3
    )
    model.save_pretrained(folder)
    folders = {
        number: write_adapter(
            model,
            tmp_path_factory.mktemp(name),
            where,
            number,
            **({"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 4}} if name == "tower" else {}),
        )
        for number, (name, where) in enumerate(TARGETS.items(), start=1)
    }
    sizes = {name: (spec.height, spec.width) for name, spec in processor.image_processor.specs.items()}
    generator = torch.Generator().manual_seed(0)
    pixels = {name: torch.randn(5, 3, *size, generator=generator) for name, size in sizes.items()}
    return folder, folders, pixels


def opened(folder):
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

    return MllmForConditionalGeneration.from_pretrained(folder).eval()


def encode_with(model, pixels):
    features, _ = model.model.vision_tower(pixels)
    return model.model.multi_modal_projector(features)


@torch.inference_mode()
def test_a_mixed_batch_is_encoded_as_peft_merges_each(world):
    from peft import PeftModel

    folder, folders, pixels = world
    expected = {0: encode_with(opened(folder), pixels)}
    for number, place in folders.items():
        merged = PeftModel.from_pretrained(opened(folder), place).merge_and_unload()
        expected[number] = encode_with(merged, pixels)
    tokens = len(expected[0]) // 5
    moved = [(expected[a] - expected[b]).abs().max().item() for a in expected for b in expected if a < b]
    assert min(moved) > 1e-2, "the adapters must matter"

    model = opened(folder)
    parts = {"vision_tower": model.model.vision_tower, "multi_modal_projector": model.model.multi_modal_projector}
    adapters = VisualAdapters(parts)
    for number, place in folders.items():
        adapters.add(number, place)

    def ours(numbers):
        def alike(pixels, weights, text, short, layouts, keys, number):
            assert (weights, text, short, layouts) == (None, None, [], None)
            assert keys == [place for place, own in enumerate(numbers) if own == number]
            return encode_with(model, pixels)

        return adapters.encode(alike, numbers, pixels, None, None, [], None, list(range(5)), tokens)

    for numbers in ([1, 0, 2, 3, 1], [3, 3, 0, 0, 2], [2, 1, 2, 1, 2]):
        made = ours(numbers)
        for place, number in enumerate(numbers):
            rows = slice(place * tokens, (place + 1) * tokens)
            torch.testing.assert_close(made[rows], expected[number][rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encode_with(model, pixels), expected[0], rtol=1e-4, atol=1e-4)
    adapters.remove(1)
    assert 1 not in adapters and 2 in adapters
    made = ours([2, 3, 2, 3, 0])
    torch.testing.assert_close(made[:tokens], expected[2][:tokens], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[-tokens:], expected[0][-tokens:], rtol=1e-4, atol=1e-4)


def test_what_has_no_place_is_refused(world, tmp_path):
    folder, folders, _ = world
    model = opened(folder)
    with pytest.raises(CheckpointError, match=r"semantic.*no place"):
        VisualAdapters({"multi_modal_projector": model.model.multi_modal_projector}).add(1, folders[1])
    parts = {"vision_tower": model.model.vision_tower, "multi_modal_projector": model.model.multi_modal_projector}
    with pytest.raises(UnavailableError, match="CUDA graphs"):
        VisualAdapters(parts, frozen=True).add(1, folders[1])


def test_an_adapters_files_tell_what_it_changes(world, tmp_path):
    folder, folders, _ = world
    assert (read_adapter(folders[2]).visual, read_adapter(folders[2]).rank) == (True, 3)
    for number in (1, 3):
        with pytest.raises(ConfigError, match=r"nothing of the language model.*mllm export"):
            read_adapter(folders[number])
    with pytest.raises(ConfigError, match="encoders or the connector"):
        adapter_rank(folders[2])
    whole = write_adapter(
        opened(folder), tmp_path / "whole", r".*language_model\..*q_proj", 7, modules_to_save=["multi_modal_projector"]
    )
    with pytest.raises(ConfigError, match=r"whole.*mllm export"):
        read_adapter(whole)


@pytest.fixture(scope="module")
def served(world):
    """vLLM's model, as far as pictures need it, with every adapter."""
    pytest.importorskip("vllm")
    from mllm.serve.http.stats import Choices
    from mllm.serve.vllm.model import MllmForConditionalGeneration

    folder, folders, _ = world
    model = opened(folder)
    made = MllmForConditionalGeneration.__new__(MllmForConditionalGeneration)
    torch.nn.Module.__init__(made)
    made.config, made.pixel_keys, made.rules = (
        model.config,
        PixelKeys(model.config.encoders),
        model.config.layout_rules(),
    )
    made.short_grid, made.shares_images, made._prepare_encoders = None, False, []
    made.vision_tower, made.multi_modal_projector = model.model.vision_tower, model.model.multi_modal_projector
    made.memories, made.choices = {}, Choices()
    made.adapters = VisualAdapters(
        {"vision_tower": made.vision_tower, "multi_modal_projector": made.multi_modal_projector}
    )
    for number, place in folders.items():
        made.add_adapter(number, place)
    return made


@torch.inference_mode()
def test_the_served_model_encodes_each_picture_of_a_step_with_its_own(world, served):
    from peft import PeftModel

    folder, folders, pixels = world
    inputs = served.pixel_keys.by_key(pixels)
    expected = {0: encode_with(opened(folder), pixels)}
    expected |= {
        number: encode_with(PeftModel.from_pretrained(opened(folder), place).merge_and_unload(), pixels)
        for number, place in folders.items()
    }
    tokens = served.rules.view.num_tokens
    for numbers in ([2, 0, 1, 3, 2], [0] * 5):
        for told in (torch.tensor(numbers), [torch.tensor([number]) for number in numbers]):  # as vLLM hands it over
            made = served.embed_multimodal(**inputs, **{ADAPTER: told})
            for place, number in enumerate(numbers):
                wanted = expected[number][place * tokens : (place + 1) * tokens]
                torch.testing.assert_close(made[place], wanted, rtol=1e-4, atol=1e-4)


def test_who_looked_at_a_picture_is_the_routers_word_though_another_request_fixed_it():
    """The header named the experts that an earlier request about the same picture had fixed."""
    pytest.importorskip("vllm")
    from mllm.serve.vllm.model import free_keys

    weights = torch.tensor([[float("nan"), float("nan")], [1.0, 0.0], [0.0, 0.0]])
    assert free_keys([7, 7, 8], weights) == [7, 0, 0] and free_keys([7, 8], None) == [7, 8]


def test_the_number_of_a_requests_adapter_travels_with_every_picture(world, served):
    from transformers import BatchFeature

    from mllm.serve.vllm.processing import MllmMultiModalProcessor, _without_adapter

    _, _, pixels = world
    processor = SimpleNamespace(info=SimpleNamespace(get_hf_config=lambda: served.config, rules=served.rules))
    for settings, number in (({ADAPTER: 2}, 2), ({}, 0)):
        made = BatchFeature(dict(served.pixel_keys.by_key(pixels)))
        fields = MllmMultiModalProcessor._get_mm_fields_config(processor, made, settings)
        assert made[ADAPTER].tolist() == [number] * 5 and ADAPTER in fields
    assert _without_adapter({ADAPTER: 2, "experts": None}) == {"experts": None}, "the processor knows no adapters"


def test_vllm_leaves_the_visual_part_of_an_adapter_to_us(world):
    pytest.importorskip("vllm")
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    from mllm.serve.vllm.model import _VISUAL, MllmForConditionalGeneration

    _, folders, _ = world
    mapper = MllmForConditionalGeneration.hf_to_vllm_mapper
    mapper = getattr(mapper, "get_rename_mapper", lambda: mapper)()
    found = {}
    for number, folder in folders.items():
        lora = LoRAModel.from_local_checkpoint(
            folder,
            {"q_proj"},
            peft_helper=PEFTHelper.from_local_dir(folder, 128),
            lora_model_id=number,
            device="cpu",
            dtype=torch.float32,
            weights_mapper=mapper,
            skip_prefixes=list(_VISUAL),
        )
        found[number] = list(lora.loras)
    assert found[1] == found[3] == []
    assert found[2] and all(name.startswith("language_model.") for name in found[2])
