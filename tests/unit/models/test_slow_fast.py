"""Does text read a video's slow tokens through its own layers' attention: as written down by hand, packed or padded, in answers as in
training?"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from PIL import Image

from mllm.data.collate import collate, collate_packed
from mllm.errors import AlignmentError, ConfigError, UnavailableError
from mllm.models.build import build_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.recipe import StageSpec
from mllm.serve.vllm.refusals import refuse_unserved
from mllm.train.engine.groups import apply_learning, recipe_parts
from mllm.types import IMAGE_MARK, Sample, Turn, Video
from tests.helpers import TINY_CLIP, TINY_LLM, picture, tiny_model, tiny_spec
from tests.videos import painted

SLOW_FAST: dict[str, Any] = {
    "encoders": {"frames": dict(TINY_CLIP)},
    "connector": {"type": "slow_fast", "cell": 2, "pool": 2, "least": 2, "every": 2},
    "video": {"frames": 5},
    "language_model": {
        "config": {**TINY_LLM, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    },
}


def changed(folder: Any, **changes: Any) -> dict[str, Any]:
    text = SLOW_FAST["language_model"]["config"] | changes
    return {**SLOW_FAST, "language_model": {"config": text, "tokenizer": str(folder)}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("slow_fast")
    model, processor = tiny_model(folder, **changed(folder))
    with torch.no_grad():
        for reader in model.model.slow_attention.values():
            reader.layer_gate.fill_(0.8)
            reader.key_value.weight.mul_(3.0)
            reader.token_gate.weight.mul_(5.0)
    return model, processor


def film(*numbers: int) -> Video:
    return Video([Image.fromarray(painted(number)) for number in numbers], fps=1)


def sample(*visuals: Any, answer: str = "seven", question: str = "What is shown?") -> Sample:
    marks = "".join(IMAGE_MARK + "\n" for _ in visuals)
    return Sample("s", [Turn("user", f"{marks}{question}"), Turn("assistant", answer)], list(visuals))


def by_call(processor: Any, text: Any, **inputs: Any) -> Any:
    return processor(
        text=text, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False, **inputs
    )


@torch.no_grad()
def test_hidden_states_are_those_written_down_by_hand(parts: Any) -> None:
    """A llama layer by layer, in which layers 0 and 2 add what their text reads of the slow tokens."""
    model, processor = parts
    inputs = by_call(processor, "Is <image> or <image> longer?", images=[[film(0, 5, 10, 15, 20), picture(1)]])
    body, decoder = model.model, model.model.language_model
    tokens = body.get_image_features(**{k: inputs[k] for k in ("pixel_values", "video_times")}).pooler_output
    assert [len(part) for part in tokens] == [2 * 4 + 5 * 4, 16], (
        "two fast frames of 2 × 2, five slow ones; a picture as it is"
    )
    slow = torch.cat([tokens[0][8:], tokens[1]])[None]
    fast = torch.cat([tokens[0][:8], tokens[1]])
    visual = inputs["input_ids"] == processor.image_token_id
    assert int(visual.sum()) == 8 + 16
    x = body.merge_images(inputs["input_ids"], body.embed_tokens(inputs["input_ids"]), fast)
    length = x.shape[1]
    rope = decoder.rotary_emb(x, torch.arange(length)[None])
    turn = sys.modules[type(decoder.layers[0].self_attn).__module__].apply_rotary_pos_emb  # pyright: ignore[reportAttributeAccessIssue]
    for number, layer in enumerate(decoder.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            getattr(attention, name)(h).view(1, length, -1, 16).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = turn(q, k, *rope)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        scores = (q @ k.transpose(-1, -2)) / 4 + torch.full((length, length), float("-inf")).triu(1)
        state = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        if number in (0, 2):
            reader = body.slow_attention[str(number)]
            pairs = reader.key_value(layer.input_layernorm(slow)).view(1, -1, 2, 2, 16)
            keys, values = (pairs[:, :, :, half].transpose(1, 2).repeat_interleave(2, dim=1) for half in (0, 1))
            found = ((q @ keys.transpose(-1, -2) / 4).softmax(-1) @ values).transpose(1, 2).flatten(2)
            gate = reader.token_gate(state).tanh() * reader.layer_gate.tanh()
            state = torch.where(visual[..., None], state, state + gate * found)
        x = x + attention.o_proj(state)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found = body(**inputs).last_hidden_state
        torch.testing.assert_close(found, decoder.norm(x), atol=2e-5, rtol=1e-4)
    gates = {number: reader.layer_gate.clone() for number, reader in body.slow_attention.items()}
    try:
        for reader in body.slow_attention.values():
            reader.layer_gate.zero_()
        closed = body(**inputs).last_hidden_state
        plain = decoder(
            inputs_embeds=body.merge_images(inputs["input_ids"], body.embed_tokens(inputs["input_ids"]), fast)
        ).last_hidden_state
        torch.testing.assert_close(closed, plain, atol=1e-5, rtol=1e-4)
        assert float((closed - found).abs().max()) > 0.05, "the slow tokens move nothing, so nothing was compared"
    finally:
        for number, reader in body.slow_attention.items():
            reader.layer_gate.copy_(gates[number])


def test_padded_and_packed_samples_read_their_own_slow_tokens(parts: Any) -> None:
    model, processor = parts
    samples = [
        encode_sample(processor, s)
        for s in (
            sample(film(0, 9, 3, 1)),
            sample(question="Just words?"),
            sample(picture(2), film(7, 8, 9, 1, 2), film(4)),
        )
    ]
    padded = collate(samples, pad_token_id=0)
    packed = collate_packed([samples], max_length=sum(map(len, samples)) + 3, pad_token_id=0)
    model.train()
    try:
        apart: dict[str, Any] = {}
        total: Any = 0.0
        model.zero_grad()
        for one in samples:
            part = model(**collate([one], pad_token_id=0).inputs).loss * one.num_supervised
            part.backward()
            total = total + part.detach()
        apart = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        readers = [name for name in apart if "slow_attention" in name]
        assert len(readers) == 2 * 5 and all(apart[name].any() for name in readers)
        for name, batch, again in (("padded", padded, False), ("packed", packed, False), ("recomputed", packed, True)):
            if again:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.zero_grad()
            whole = model(**batch.inputs, use_cache=False).loss * sum(one.num_supervised for one in samples)
            model(**collate([samples[1]], pad_token_id=0).inputs)  # another pass between
            whole.backward()
            torch.testing.assert_close(whole.detach(), total, atol=1e-4, rtol=1e-4, msg=name)
            for parameter, gradient in apart.items():
                found = model.get_parameter(parameter).grad
                torch.testing.assert_close(found, gradient, atol=2e-4, rtol=2e-3, msg=f"{name}: {parameter}")
        model.gradient_checkpointing_disable()
        model.zero_grad()
        model(**collate([samples[1]], pad_token_id=0).inputs).loss.backward()
        idle = [p.grad for name, p in model.named_parameters() if "slow_attention" in name]
        assert all(gradient is not None and not gradient.any() for gradient in idle), "ranks reduce the same gradients"
    finally:
        model.eval()


def test_answers_read_the_slow_tokens_with_and_without_a_cache(parts: Any, tmp_path: Any) -> None:
    model, processor = parts
    prompts = [
        ("<image>\nWhat?", [film(1, 2, 3, 4)]),
        ("Words alone here.", []),
        ("<image> <image>!", [picture(1), film(9, 8)]),
    ]
    inputs = by_call(processor, [text for text, _ in prompts], images=[visuals for _, visuals in prompts])
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    kept = model.generate(**inputs, **options)
    whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(kept.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(kept.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)
    beams = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=2)
    assert torch.equal(beams, model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=2, use_cache=False))
    start = inputs["input_ids"].shape[1]
    for number, (text, visuals) in enumerate(prompts):
        alone = by_call(processor, text, **({"images": [visuals]} if visuals else {}))
        answer = model.generate(**alone, max_new_tokens=6, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert answer.tolist() == kept.sequences[number, start:].tolist()
    with torch.no_grad():  # a second turn goes on from the first one's cache, and reads both videos
        first = by_call(processor, "<image> one ", images=[[film(1, 2, 3)]])
        later = by_call(processor, "<image> two", images=[[film(5, 6, 7)]])
        cache = model(**first, use_cache=True).past_key_values
        found = model(**{k: v for k, v in later.items() if k != "attention_mask"}, past_key_values=cache).logits
        other = model(**by_call(processor, "<image> one ", images=[[film(9, 0, 4)]]), use_cache=True).past_key_values
        moved = model(**{k: v for k, v in later.items() if k != "attention_mask"}, past_key_values=other).logits
        assert cache.slow_tokens.tokens.shape[1] == 2 * 3 * 4 and not torch.allclose(found, moved, atol=1e-3)
        with pytest.raises(AlignmentError, match="slow tokens of 1 prompts, the batch has 2"):
            model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    model.save_pretrained(tmp_path)
    opened = MllmForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert "slow_tokens" not in (tmp_path / "config.json").read_text()
    again = opened.generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(kept.logits), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma2"])
def test_other_language_models_read_them_too(kind: str, tmp_path: Any) -> None:
    """Of Qwen3 the heads' width is its own; a published model's own keys and values are where reading starts."""
    model, processor = tiny_model(tmp_path, **changed(tmp_path, model_type=kind, head_dim=24))
    body = model.model
    text = body.language_model
    published = type(text)(text.config)
    body.take_decoder(published)
    reader, attention = body.slow_attention["2"], published.layers[2].self_attn
    slow = torch.randn(1, 3, 64)
    with torch.no_grad():
        key, value = reader.pairs(slow)
        for found, projection in ((key, attention.k_proj), (value, attention.v_proj)):
            torch.testing.assert_close(found, projection(slow).view(1, 3, 2, -1).transpose(1, 2), atol=1e-5, rtol=1e-4)
        inputs = by_call(processor, "Is <image>?", images=[[film(0, 5, 10)]])
        before = model(**inputs).logits
        for reader in body.slow_attention.values():
            reader.layer_gate.fill_(2.0)
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-4)


def test_its_parts_learn_by_name_and_what_does_not_fit_is_told(parts: Any, tmp_path: Any) -> None:
    model, _ = parts
    spec = tiny_spec(str(tmp_path), **changed(tmp_path))
    assert "slow_attention" in recipe_parts(spec)
    stage = StageSpec.model_validate(
        {"name": "pretrain", "learn": {"connector": 1e-3, "slow_attention": 2e-4}, "data": "x", "steps": 1}
    )
    groups = apply_learning(model, stage)
    assert {group.part: group.lr for group in groups} == {"connector": 1e-3, "slow_attention": 2e-4}
    assert all(p.requires_grad == ("slow_attention" in n or "projector" in n) for n, p in model.named_parameters())
    model.requires_grad_(True)
    with pytest.raises(UnavailableError, match=r"slow tokens in every 2\. layer .*slow_fast.*mllm chat"):
        refuse_unserved(model.config)
    video, connector = {"frames": 4}, {"type": "slow_fast"}
    for changes, told in [
        ({"video": None}, r"thins videos that are seen once; add model\.video"),
        ({"views": {"type": "tiles"}}, r"thins videos that are seen once; leave model\.views \(tiles\) out"),
        ({"connector": connector | {"cell": 3}}, "a frame's map is 4×4, which cell 3 times side 1 does not divide"),
        ({"connector": connector | {"each": {"type": "deepstack"}}}, "channels|deepstack"),
    ]:
        with pytest.raises(ConfigError, match=told):
            build_config(tiny_spec(str(tmp_path), **{**changed(tmp_path), "video": video, **changes}))
    with pytest.raises(ConfigError, match="GPT2Model have another form than those that can read slow tokens"):
        gpt2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 2}
        tiny_model(tmp_path, **{**SLOW_FAST, "language_model": {"config": gpt2, "tokenizer": str(tmp_path)}})
