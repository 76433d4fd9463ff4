"""Do visual tokens read their windows again inside the language model, as in Cambrian-1: in training, packed, from the cache, from disk?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mllm.connectors.build import build_connector, connector_config
from mllm.data.collate import collate, collate_packed
from mllm.errors import ConfigError, UnavailableError
from mllm.models.build import build_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.serve.vllm.refusals import refuse_unserved
from mllm.types import EncoderInfo, ImageSpec
from tests.helpers import TINY_LLM, picture, samples_of_unlike_sizes, tiny_model, tiny_spec

INSIDE = {"count": 2, "start": 0, "stride": 2}
CAMBRIAN: dict[str, Any] = {"type": "spatial_aggregator", "grid": [2, 2], "hidden": 16, "depth": 1, "num_heads": 2}


def cambrian(folder: str, **connector: Any) -> dict[str, Any]:
    language = {"config": {**TINY_LLM, "num_hidden_layers": 4}, "tokenizer": folder}
    return {"connector": {**CAMBRIAN, "inside": INSIDE, **connector}, "language_model": language}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = str(tmp_path_factory.mktemp("cambrian"))
    return tiny_model(folder, **cambrian(folder))


@pytest.fixture(scope="module")
def inputs(sampled: tuple[Any, Any]) -> Any:
    pictures = [[picture(1)], [picture(2, size=(20, 50)), picture(3, size=(90, 20))], []]
    texts = ["<image> which ", "<image> a <image> question ", " none "]
    return sampled[1](text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")


@torch.no_grad()
def test_hidden_states_are_replaced_behind_the_layers_and_row_ends_are_not(
    sampled: tuple[Any, Any], inputs: Any
) -> None:
    """The same pass by hand, layer after layer: Cambrian's rule, on one sample without padding."""
    model, processor = sampled[0].model, sampled[1]
    one = processor(text=["<image> which "], images=[[picture(1)]], return_tensors="pt")
    joined = model.get_image_features(one["pixel_values"], pixel_values_detail=one["pixel_values_detail"]).pooler_output
    tokens, beside = joined[0, :, :64], joined[0, :, 64:]
    hidden = model.merge_images(one["input_ids"], model.embed_tokens(one["input_ids"]), tokens[None])
    places = (one["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    cells = places.view(2, 3)[:, :2].flatten()  # two rows of two cells and an end
    rows = torch.tensor([0, 1, 3, 4])
    text = model.language_model
    position = torch.arange(hidden.shape[1])[None]
    rotary = text.rotary_emb(hidden, position)
    causal = torch.full((hidden.shape[1], hidden.shape[1]), float("-inf")).triu(1)[None, None]
    hid, moved = model.multi_modal_projector.config.hidden, 0.0
    sizes = model.multi_modal_projector.inside[0].windows
    for number, layer in enumerate(text.layers):
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, position_ids=position)
        if number in (0, 2):
            sampler = model.multi_modal_projector.inside[number // 2].aggregator
            context = beside[rows, None, :hid]
            windows = beside[rows, hid : hid * (1 + sum(sizes))].unflatten(1, (-1, hid)).split(sizes, dim=1)
            read = sampler(hidden[0, cells, None], context, windows)[:, 0]
            moved = max(moved, float((read - hidden[0, cells]).abs().max()))
            hidden = hidden.clone()
            hidden[0, cells] = read
    assert moved > 0.05, "the samplers move nothing, so nothing was compared"
    torch.testing.assert_close(model(**one).last_hidden_state, text.norm(hidden), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["joint", "sep"])
def test_samplers_read_what_the_connector_read(sampler: str) -> None:
    encoders = {
        name: EncoderInfo(image=ImageSpec(height=16, width=16), grid=(side, side), width=6)
        for name, side in (("a", 2), ("b", 4))
    }
    torch.manual_seed(0)
    connector: Any = build_connector({**CAMBRIAN, "sampler": sampler, "inside": INSIDE}, encoders, 32)
    assert connector.token_width == 32 + connector.layout(connector.config, connector.encoders).beside
    context, windows = torch.randn(5, 16), [torch.randn(5, 1, 16), torch.randn(5, 4, 16)]
    hidden = torch.randn(5, 32)
    weights = torch.tensor([[1.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [0.25, 1.0]])
    beside = torch.cat([context, *(w.flatten(1) for w in windows), weights, torch.tensor([[1.0]] * 4 + [[0.0]])], 1)
    found = connector.readers()[2](hidden, beside)
    keys = [weights[:, :1].log(), weights[:, 1:].log().expand(-1, 4)]
    wanted = connector.inside[1].aggregator(hidden[:, None], context[:, None], windows, keys)[:, 0]
    torch.testing.assert_close(found[:4], wanted[:4])
    assert torch.equal(found[4], hidden[4]), "a token without windows stays"


def test_samples_give_the_same_loss_alone_and_packed_and_all_parts_learn(sampled: tuple[Any, Any]) -> None:
    model, processor = sampled
    encoded = [encode_sample(processor, sample) for sample in samples_of_unlike_sizes()]
    counts = torch.tensor([sample.num_supervised for sample in encoded], dtype=torch.float32)
    with torch.no_grad():
        alone = torch.tensor([float(model(**collate([sample], pad_token_id=0).inputs).loss) for sample in encoded])
        wanted = float((alone * counts).sum() / counts.sum())
        assert abs(float(model(**collate(encoded, pad_token_id=0).inputs).loss) - wanted) < 1e-5
        packed = collate_packed([encoded[:3], encoded[3:]], max_length=sum(map(len, encoded[:3])), pad_token_id=0)
        assert abs(float(model(**packed.inputs, skip_logits=True, use_cache=False).loss) - wanted) < 1e-5
    model.train()
    touched, grads = [], []
    for batch, again in ((encoded, False), (encoded, True), ([encoded[1]], False)):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**collate(batch, pad_token_id=0).inputs, use_cache=False).loss.backward()
        model.gradient_checkpointing_disable()
        touched.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if ".inside." in n and p.grad is not None})
    model.zero_grad()
    model.eval()
    assert touched[0] == touched[2] == {name for name, _ in model.named_parameters()}, (
        "ranks would reduce unlike gradients"
    )
    assert len({name.split(".inside.")[1][0] for name in grads[0]}) == 2 and all(g.any() for g in grads[0].values())
    assert not any(g.any() for g in grads[2].values())
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def test_answers_from_the_cache_from_disk_and_of_former_checkpoints(
    sampled: tuple[Any, Any], inputs: Any, tmp_path: Any
) -> None:
    model = sampled[0]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), cached)
    model.save_pretrained(tmp_path)
    again = MllmForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**inputs, **options), cached)
    wide = model.get_image_features(inputs["pixel_values"], pixel_values_detail=inputs["pixel_values_detail"])
    words = {key: value for key, value in inputs.items() if not key.startswith("pixel")}
    given = model(**words, image_features=wide.pooler_output).logits
    torch.testing.assert_close(given, model(**inputs).logits, atol=1e-5, rtol=1e-4)
    former = connector_config(dict(CAMBRIAN))
    assert former.inside is None and "inside" not in str(
        list(
            build_connector(
                former, {"a": EncoderInfo(image=ImageSpec(height=16, width=16), grid=(2, 2), width=6)}, 32
            ).state_dict()
        )
    )


def test_what_cannot_stand_is_refused(sampled: tuple[Any, Any], tmp_path: Any) -> None:
    with pytest.raises(
        UnavailableError, match=r"inside its language model \(connector spatial_aggregator: inside\).*mllm chat"
    ):
        refuse_unserved(sampled[0].config)
    many = cambrian(str(tmp_path), inside={"count": 3, "stride": 2})
    with pytest.raises(ConfigError, match=r"last sampler is behind layer 4.*at least 6 layers.*inside\.count"):
        MllmForConditionalGeneration(build_config(tiny_spec(str(tmp_path), **many)))


def test_cambrian_8b_has_ten_samplers_of_22_million() -> None:
    image = ImageSpec(height=16, width=16)
    encoders = {
        name: EncoderInfo(image=image, grid=(side, side), width=32)
        for name, side in (("siglip", 24), ("clip", 24), ("dino", 24), ("convnext", 96))
    }
    with torch.device("meta"):
        connector: Any = build_connector({"type": "spatial_aggregator", "inside": {}}, encoders, 4096)
    assert sorted(connector.readers()) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    for reader in connector.readers().values():
        assert sum(p.numel() for p in reader.parameters()) / 1e6 == pytest.approx(22.1, abs=0.05)
