"""Does the model draw what its own logits say, whatever the batch, and does its grammar hold?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import AlignmentError, ConfigError
from mllm.heads.base import Step
from mllm.heads.codes.generate import read_interleaved
from mllm.heads.codes.grammar import vocabulary_offsets
from mllm.heads.codes.targets import lay_images
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import render_prompt
from mllm.processing.processor import MllmProcessor
from mllm.types import IMAGE_MARK, Turn
from mllm.visual_tokenizers.sequence import code_blocks, decode_packed
from tests.helpers import picture
from tests.unit.heads.drawing_models import PAIRS, PROMPTS, batch, draw_sample, drawing_model, one, read_sample


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def drawer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    head, tokenizer = request.param
    model, processor = drawing_model(tmp_path_factory.mktemp("model"), head, tokenizer)
    return head, model, processor


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model with a vocabulary head."""
    return drawing_model(tmp_path_factory.mktemp("writer"), "vocabulary", "illume")


@torch.no_grad()
def teacher_forced(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The most likely code at every place, given the true codes before it, without a cache ``(S,)``."""
    head, tokenizer = model.visual_head, model.image_tokenizer
    best = torch.empty(tokenizer.tokens_per_image, dtype=torch.int64)
    if not head.has_weights:
        logits = model(**inputs).logits[0]
        places = (inputs["input_ids"][0] == model.visual_config.tokens["code"]).nonzero().flatten()
        for block in code_blocks(tokenizer):
            for place in range(block.start, block.start + block.number):
                first = int(vocabulary_offsets(model.visual_config, model.image_tokenizer)[place])
                best[place] = logits[places[place] - 1, first : first + block.size].argmax()
        return best
    step = Step(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
    drawn = lay_images(model, inputs["target_images"], step)
    hidden = model.model(input_ids=step.input_ids, attention_mask=step.attention_mask, **step.inputs).last_hidden_state
    first = int(drawn.starts[0, 1])
    states = hidden[:, first : first + head.num_steps]
    for (_, start), logits in head.logits(states, drawn.codes, tokenizer).items():
        best[start : start + logits.shape[1]] = logits[0].argmax(-1)
    return best


def test_cached_drawing_at_temperature_0_is_the_teacher_forced_argmax(drawer: Any) -> None:
    _, model, processor = drawer
    drawn = model.generate_images(PROMPTS, processor=processor, temperature=0)
    assert drawn.pixels.shape == (3, 3, 16, 16) and drawn.pixels.min() >= 0 and drawn.pixels.max() <= 1
    for row, prompt in enumerate(PROMPTS):
        inputs = batch(processor, draw_sample(prompt, one(drawn.codes, row)))
        assert torch.equal(inputs["target_images"][0], drawn.packed[row])
        assert torch.equal(teacher_forced(model, inputs), drawn.packed[row])


def test_a_batch_draws_what_each_prompt_alone_draws(drawer: Any) -> None:
    _, model, processor = drawer
    for options in ({"temperature": 0}, {"temperature": 0, "cfg_scale": 2.5}):
        together = model.generate_images(PROMPTS, processor=processor, **options)
        alone = [model.generate_images(prompt, processor=processor, **options).packed for prompt in PROMPTS]
        assert torch.equal(together.packed, torch.cat(alone)), options


def test_a_seed_reproduces_each_sample_whatever_the_batch(drawer: Any) -> None:
    _, model, processor = drawer
    options = {"processor": processor, "cfg_scale": 1.5, "top_k": 8, "top_p": 0.9}
    drawn = model.generate_images(PROMPTS, seed=5, **options)
    assert torch.equal(drawn.packed, model.generate_images(PROMPTS, seed=5, batch_size=2, **options).packed)
    assert torch.equal(drawn.packed[2:], model.generate_images(PROMPTS[2:], seed=[7], **options).packed)
    other = model.generate_images(PROMPTS, seed=50, **options)
    assert not torch.equal(drawn.packed, other.packed)


def test_guidance_1_is_no_guidance_and_another_scale_changes_the_drawing(drawer: Any) -> None:
    head, model, processor = drawer
    plain = model.generate_images(PROMPTS, processor=processor, temperature=0)
    guided = model.generate_images(
        PROMPTS, processor=processor, temperature=0, cfg_scale=1.0 + 1e-9
    )  # both branches run
    assert torch.equal(plain.packed, guided.packed)
    strong = model.generate_images(PROMPTS, processor=processor, temperature=0, cfg_scale=6.0)
    assert not torch.equal(plain.packed, strong.packed)
    if head != "next_scale":  # guidance 0 is the drawing without text, the same for prompts of one length
        without = model.generate_images(["Draw a 3", "Draw a 7"], processor=processor, temperature=0, cfg_scale=0.0)
        assert torch.equal(without.packed[0], without.packed[1])
    same = model.generate_images(
        PROMPTS[:1], processor=processor, temperature=0, cfg_scale=6.0, negative_prompt=PROMPTS[0]
    )
    assert torch.equal(same.packed, plain.packed[:1]), "a negative prompt equal to the prompt takes nothing away"


def test_drawing_leaves_modes_and_random_state_alone(drawer: Any) -> None:
    _, model, processor = drawer
    model.train()
    model.image_tokenizer.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    model.generate_images(PROMPTS[:1], processor=processor, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == {name: module.training for name, module in model.named_modules()}
    model.eval()


def test_saved_and_loaded_the_model_draws_and_reads_the_same(drawer: Any, tmp_path: Path) -> None:
    _, model, processor = drawer
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reread = MllmForConditionalGeneration.from_pretrained(tmp_path), MllmProcessor.from_pretrained(tmp_path)
    assert reread.span == processor.span
    for (name, one_), (_, other) in zip(
        model.image_tokenizer.state_dict().items(), again.image_tokenizer.state_dict().items()
    ):
        assert torch.equal(one_, other), f"the tokenizer's {name} is not saved inside the model"
    expected = model.generate_images(PROMPTS, processor=processor, seed=1, cfg_scale=2.0)
    got = again.generate_images(PROMPTS, processor=reread, seed=1, cfg_scale=2.0)
    assert torch.equal(expected.packed, got.packed)
    # loaded weights lie elsewhere in memory, where a matrix product may round otherwise
    torch.testing.assert_close(expected.pixels, got.pixels, rtol=1e-5, atol=1e-6)
    samples = draw_sample("Draw", picture(1)), read_sample(picture(2))
    with torch.no_grad():
        losses = model(**batch(processor, *samples)).loss, again(**batch(reread, *samples)).loss
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_the_same_weights_answer_in_text_without_image_tokens(drawer: Any) -> None:
    head, model, processor = drawer
    prompt = render_prompt(processor, [Turn("user", IMAGE_MARK + "Which?")])
    inputs = processor(text=[prompt], images=[[picture(3)]], return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=True, temperature=2.0, num_return_sequences=4)
    new = out[:, inputs["input_ids"].shape[1] :]
    assert not (new == model.visual_config.tokens["code"]).any() and not (new == model.config.image_token_id).any()
    if head != "vocabulary":
        assert not (new == model.visual_config.tokens["start"]).any()


def test_a_picture_in_the_prompt_changes_what_is_drawn(tmp_path: Path) -> None:
    model, processor = drawing_model(tmp_path, "separate")
    turns = [Turn("user", IMAGE_MARK + "Draw it again")]
    options = {"processor": processor, "temperature": 0, "cfg_scale": 2.0}
    both = model.generate_images([turns, turns], images=[[picture(1)], [picture(2)]], **options)
    alone = model.generate_images([turns], images=[[picture(2)]], **options)
    assert torch.equal(both.packed[1:], alone.packed) and not torch.equal(both.packed[0], both.packed[1])
    with pytest.raises(AlignmentError, match="prompt 0: 1 image placeholders and 0 images"):
        model.generate_images([turns], **options)


@pytest.mark.parametrize("number", [1, 3, 7])
def test_the_grammar_holds_for_every_sample_of_any_batch(writer: Any, number: int) -> None:
    model, _ = writer
    grammar, start = model.grammar, model.visual_config.tokens["start"]
    with torch.no_grad():
        model.lm_head.weight[start] += 0.35  # so that images are begun at different times
    ids = torch.randint(5, 200, (number, 6), generator=torch.Generator().manual_seed(number))
    torch.manual_seed(number)
    options = {
        "do_sample": True,
        "temperature": 2.0,
        "eos_token_id": None,
        "min_new_tokens": 180,
        "max_new_tokens": 180,
    }
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, 6:]
    with torch.no_grad():
        model.lm_head.weight[start] -= 0.35
    images = 0
    for row in out:
        position = 0
        while position < len(row):
            if int(row[position]) == start:
                body = row[position + 1 : position + grammar.length]
                for place, token in enumerate(body.tolist()):
                    low, high = grammar.ranges[place]
                    assert low <= token < high
                images += len(body) == grammar.length - 1
                position += grammar.length
                continue
            assert all(not low <= int(row[position]) < high for low, high in grammar.reserved())
            position += 1
    assert images >= number, "the test should have seen images"


def test_an_interleaved_answer_is_parsed_into_text_and_images(writer: Any) -> None:
    model, processor = writer
    grammar, tokenizer = model.grammar, processor.tokenizer
    drawn = model.generate_images(PROMPTS[:2], processor=processor, seed=0)
    blocks = code_blocks(model.image_tokenizer)
    spans = [grammar.write({b.name: row[b.start : b.start + b.number] for b in blocks}) for row in drawn.packed]
    words = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("Here: ", " and ", ".")]
    ids = torch.cat([words[0], spans[0], words[1], spans[1], words[2]])
    answer = read_interleaved(model, tokenizer, ids)
    assert [part if isinstance(part, str) else "image" for part in answer.parts] == [
        "Here: ",
        "image",
        " and ",
        "image",
        ".",
    ]
    assert torch.equal(torch.stack(answer.packed), drawn.packed) and answer.text == "Here:  and ."
    for ours, theirs in zip(answer.images, drawn.pil(), strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1, "equal but for rounding to 8 bits"
    with pytest.raises(
        AlignmentError, match=rf"image at position 6 is cut off after 9 of {len(grammar.ranges)} tokens"
    ):
        read_interleaved(model, tokenizer, ids[:16])
    broken = ids.clone()
    broken[10] = 5
    with pytest.raises(AlignmentError, match="position 10: id 5 is not allowed there"):
        read_interleaved(model, tokenizer, broken)


def test_interleaved_generation_gives_text_and_images(writer: Any) -> None:
    model, processor = writer
    start, eos = model.visual_config.tokens["start"], processor.tokenizer.eos_token_id
    wanted = iter([start])
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: _prefer(logits, next(wanted, eos)))
    answers = model.generate_interleaved(PROMPTS, processor=processor, do_sample=False, max_new_tokens=100)
    hook.remove()
    assert [len(answer.images) for answer in answers] == [1, 1, 1]
    assert all(isinstance(answer.parts[0], Image.Image) for answer in answers)
    assert torch.equal(
        answers[1].packed[0], model.generate_images(PROMPTS, processor=processor, temperature=0).packed[1]
    )


def _prefer(logits: torch.Tensor, token: int) -> torch.Tensor:
    """What the model says wherever it may."""
    logits = logits.clone()
    logits[..., token] = 50
    return logits


def test_what_cannot_be_drawn_is_refused(drawer: Any, writer: Any, tmp_path: Path) -> None:
    head, model, processor = drawer
    total = model.image_tokenizer.tokens_per_image
    with pytest.raises(ConfigError, match="out of range"):
        decode_packed(model.image_tokenizer, torch.full((1, total), 10**6))
    with pytest.raises(AlignmentError, match=f"has {total} codes.*cut inside an image"):
        decode_packed(model.image_tokenizer, torch.zeros(1, total - 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="prompts is empty"):
        model.generate_images([], processor=processor)
    with pytest.raises(ConfigError, match="this model's own processor"):
        model.generate_images("Draw")
    with pytest.raises(ConfigError, match="2 seeds for 1 prompts"):
        model.generate_images("Draw", processor=processor, seed=[1, 2])
    if head != "vocabulary":
        with pytest.raises(ConfigError, match="needs a vocabulary head"):
            model.generate_interleaved("Draw", processor=processor)
    inputs = batch(processor, draw_sample("Draw", picture(1)))
    cut = {k: v[:, :-12] if k in ("input_ids", "labels", "attention_mask") else v for k, v in inputs.items()}
    with pytest.raises(AlignmentError, match="cut inside an image"):
        model(**cut)


def test_a_model_without_a_head_says_what_to_add(tmp_path: Path) -> None:
    from tests.helpers import tiny_model

    model, processor = tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="none of its heads draws"):
        model.generate_images("Draw", processor=processor)


def test_parts_that_do_not_fit_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="next_scale head needs a multi-scale tokenizer"):
        drawing_model(tmp_path / "a", "next_scale", "vq")
    with pytest.raises(ConfigError, match="depth head does not write multi-scale codes"):
        drawing_model(tmp_path / "b", "depth", "tokenflow")
    with pytest.raises(ConfigError, match="no codebook 'pixels'; it has pixel"):
        drawing_model(tmp_path / "c", "separate", head_options={"weights": {"pixels": 2.0}})
    with pytest.raises(ConfigError, match="names an encoder of type visual_tokenizer"):
        drawing_model(tmp_path / "d", "separate", visual_tokenizer={"encoder": "code"})
    with pytest.raises(ConfigError, match=r"heads\.draw\.type 'seperate', did you mean 'separate'"):
        drawing_model(tmp_path / "e", "seperate")
