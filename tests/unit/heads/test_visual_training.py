"""Is the loss of a batch that reads and draws the sum of what its tokens and codes say?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mllm.data.collate import collate, collate_packed
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.heads.base import Step
from mllm.heads.codes.grammar import vocabulary_offsets
from mllm.heads.codes.targets import DrawnImages, code_losses, codes_of, drop_text, lay_images, of_book
from mllm.processing.chat import IGNORE, encode_sample
from mllm.types import IMAGE_MARK, Sample, Turn
from mllm.visual_tokenizers.sequence import code_blocks, unpack_codes
from tests.helpers import picture
from tests.unit.heads.drawing_models import PAIRS, batch, draw_sample, drawing_model, read_sample


@pytest.mark.parametrize(("head", "tokenizer"), PAIRS)
def test_the_loss_is_text_plus_weighted_codes_over_one_count(head: str, tokenizer: str, tmp_path: Path) -> None:
    book = {"vq": "pixel", "tokenflow": "shared"}.get(tokenizer, "semantic")
    model, processor = drawing_model(
        tmp_path, head, tokenizer, head_options={"weights": {book: 3.0}, "text_dropout": 0.0}
    )
    model.eval()
    inputs = batch(
        processor, draw_sample("Draw", picture(1)), read_sample(picture(2)), draw_sample("A longer one", picture(3))
    )
    assert inputs["target_images"].shape == (2, 3, 16, 16) and inputs["pixel_values"].shape[0] == 1
    with torch.no_grad():
        output, chunked = model(**inputs), model(**inputs, skip_logits=True)
    torch.testing.assert_close(output.loss, chunked.loss, atol=1e-5, rtol=1e-5)
    # By hand: cross-entropy of the text labels that are no codes, and of the codes, over all supervised tokens.
    labels, code = inputs["labels"], model.visual_config.tokens["code"]
    text = labels.masked_fill(labels == code, IGNORE)[:, 1:]
    count = int((labels[:, 1:] != IGNORE).sum())
    logits = output.logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), text.flatten(), ignore_index=IGNORE, reduction="sum") / count
    slots = int((labels == code).sum()) // 2
    share = slots / model.image_tokenizer.tokens_per_image
    assert set(output.losses) == {f"draw/{book}" for book in model.image_tokenizer.codebooks}
    for name, (_, depth) in model.image_tokenizer.codebooks.items():
        number = 2 * model.image_tokenizer.num_positions[name] * depth
        expected = expected + (3.0 if name == book else 1.0) * share * output.losses[f"draw/{name}"] * number / count
    torch.testing.assert_close(output.loss, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("head", "tokenizer"), [("separate", "vq"), ("vocabulary", "vq"), ("depth", "dualtoken")])
def test_packed_rows_and_stored_codes_give_the_loss_of_padded_pictures(
    head: str, tokenizer: str, tmp_path: Path
) -> None:
    model, processor = drawing_model(tmp_path, head, tokenizer)
    samples = [draw_sample("Draw", picture(1)), read_sample(picture(2)), draw_sample("More", picture(3))]
    encoded = [encode_sample(processor, sample) for sample in samples]
    padded = collate(encoded, pad_token_id=0).inputs
    packed = collate_packed([encoded], max_length=400, pad_token_id=0).inputs
    with torch.no_grad():
        packed_codes = codes_of(model.image_tokenizer, padded["target_images"])
        one, other, third = (
            model(**inputs, skip_logits=True, use_cache=False).loss
            for inputs in (padded, packed, {**padded, "target_images": packed_codes})
        )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one, third, atol=1e-6, rtol=1e-6)
    given = unpack_codes(model.image_tokenizer, packed_codes[:1])
    from_codes = encode_sample(processor, draw_sample("Draw", given))
    assert torch.equal(from_codes.targets, packed_codes[:1]) and torch.equal(from_codes.input_ids, encoded[0].input_ids)
    with pytest.raises(AlignmentError, match="as pictures and as stored codes in one batch"):
        collate([from_codes, encoded[2]], pad_token_id=0)


@pytest.mark.parametrize(
    ("head", "tokenizer"),
    [("separate", "illume"), ("vocabulary", "vq"), ("depth", "illume"), ("next_scale", "tokenflow")],
)
def test_a_head_learns_to_draw_and_read_two_images(head: str, tokenizer: str, tmp_path: Path) -> None:
    changes = {"dropout": 0.0} if head == "depth" else {}
    model, processor = drawing_model(
        tmp_path, head, tokenizer, scale=1.0, head_options={"text_dropout": 0.1, **changes}
    )
    inputs = batch(
        processor,
        draw_sample("Draw a one", picture(1)),
        draw_sample("Draw a two", picture(2)),
        read_sample(picture(1), "one"),
        read_sample(picture(2), "two"),
    )
    torch.manual_seed(0)
    model.train()
    model.image_tokenizer.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(90 if head == "vocabulary" else 50):
        optimizer.zero_grad()
        model(**inputs, skip_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        codes = codes_of(model.image_tokenizer, inputs["target_images"])
        read = model(**inputs).logits.argmax(-1)[:, :-1]
    drawn = model.generate_images(["Draw a one", "Draw a two"], processor=processor, temperature=0, cfg_scale=1.5)
    assert (drawn.packed == codes).float().mean() > 0.9
    labels = inputs["labels"][2:, 1:]
    assert (read[2:][labels != IGNORE] == labels[labels != IGNORE]).all()


def test_text_before_an_image_is_dropped_and_its_labels_with_it(tmp_path: Path) -> None:
    model, processor = drawing_model(tmp_path, "separate", head_options={"text_dropout": 0.5})
    sample = Sample(
        "x", [Turn("user", "Say hi and draw"), Turn("assistant", "hi " + IMAGE_MARK + " done")], [picture(1)]
    )
    inputs = batch(processor, sample, draw_sample("Draw", picture(2)))
    tokens, ids = model.visual_config.tokens, inputs["input_ids"]
    starts = (ids == tokens["start"]).nonzero()
    first = torch.zeros(2, dtype=torch.long)
    dropped, labels = drop_text(ids, starts, first, tokens["null"], model.is_visual(ids), inputs["labels"])
    for row, (_, column) in enumerate(starts.tolist()):
        assert dropped[row, 0] == ids[row, 0] and (dropped[row, 1:column] == tokens["null"]).all()
        assert torch.equal(dropped[row, column:], ids[row, column:])
        assert (labels[row, : column + 1] == IGNORE).all() and torch.equal(
            labels[row, column + 1 :], inputs["labels"][row, column + 1 :]
        )
    # It is applied in training alone, to about the stated share, and drawn from the global generator.
    model.train()
    torch.manual_seed(3)

    def laid() -> torch.Tensor:
        return lay_images(model, inputs["target_images"], Step(ids, inputs["labels"])).input_ids

    kept = [int((laid() == ids).all(1).sum()) for _ in range(100)]
    torch.manual_seed(3)
    assert kept == [int((laid() == ids).all(1).sum()) for _ in range(100)]
    assert 60 < sum(kept) < 140
    model.eval()
    assert torch.equal(laid(), ids)


@pytest.mark.parametrize(("head", "tokenizer"), PAIRS)
def test_noisy_codes_are_read_in_training_and_the_true_ones_told(head: str, tokenizer: str, tmp_path: Path) -> None:
    model, processor = drawing_model(tmp_path, head, tokenizer, head_options={"code_noise": 0.5, "text_dropout": 0.0})
    turns = [
        Turn("user", "Draw"),
        Turn("assistant", IMAGE_MARK, False),
        Turn("user", "Draw"),
        Turn("assistant", IMAGE_MARK),
    ]
    inputs = batch(processor, Sample("x", turns, [picture(1), picture(2)]))
    model.train()
    model.image_tokenizer.eval()

    def laid() -> DrawnImages:
        return lay_images(model, inputs["target_images"], Step(inputs["input_ids"], inputs["labels"]))

    torch.manual_seed(3)
    drawn = laid()
    true = codes_of(model.image_tokenizer, inputs["target_images"])
    assert torch.equal(drawn.codes, true) and torch.equal(
        drawn.read[0], true[0]
    )  # the first one is not learned: it is context
    assert 0.25 < (drawn.read[1] != true[1]).float().mean() < 0.75
    unpack_codes(model.image_tokenizer, drawn.read)  # ids of their codebooks, every one
    torch.manual_seed(3)
    assert torch.equal(laid().read, drawn.read)  # from the global generator, which a resumed run sets
    for labels in drawn.code_labels.values():
        told = labels[labels != IGNORE]
        offsets = vocabulary_offsets(model.visual_config, model.image_tokenizer)
        assert torch.isin(told, true[1] + offsets).all()
    model.eval()
    assert torch.equal(laid().read, true)


def test_a_model_that_reads_noisy_codes_tells_them_from_the_words(tmp_path: Path) -> None:
    """All codes of a picture are alike here, so with the true ones before it each but the first can be copied."""
    told = {}
    for noise in (0.0, 0.9):
        torch.manual_seed(0)
        (folder := tmp_path / f"{noise}").mkdir()
        model, processor = drawing_model(folder, "separate", head_options={"code_noise": noise, "text_dropout": 0.0})
        samples = [draw_sample(f"Draw a {name}", picture(k)) for k, name in enumerate(("one", "two", "six"))]
        inputs = batch(processor, *samples)
        codes = torch.tensor([3, 7, 11])[:, None].expand(-1, model.image_tokenizer.tokens_per_image).contiguous()
        inputs["target_images"] = codes
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model.train()
        for _ in range(40):
            optimizer.zero_grad()
            model(**inputs, skip_logits=True).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():  # another's codes before: does it follow them, or its words?
            step = Step(inputs["input_ids"], inputs["labels"])
            drawn = lay_images(model, codes.roll(1, 0), step)
            hidden = model.model(input_ids=step.input_ids, attention_mask=inputs["attention_mask"], **step.inputs)[0]
            drawn.codes = codes
            told[noise] = float(code_losses(model, drawn, hidden, 1.0).parts["pixel"])
    assert told[0.9] < 0.5 * told[0.0], told


@pytest.mark.parametrize(("head", "tokenizer"), [pair for pair in PAIRS if pair[0] != "vocabulary"])
def test_codes_of_what_changes_count_more(head: str, tokenizer: str, tmp_path: Path) -> None:
    options = {"changed_weight": 9.0, "text_dropout": 0.0}
    model, processor = drawing_model(tmp_path, head, tokenizer, head_options=options)
    model.eval()
    source = np.full((16, 16, 3), 120, np.uint8)
    edited = source.copy()
    edited[:8, 8:] = (250, 0, 0)  # a quarter
    edited[12:] += 9  # less than a change
    turns = [Turn("user", f"{IMAGE_MARK}Edit"), Turn("assistant", IMAGE_MARK)]
    edit = Sample("e", turns, [Image.fromarray(source), Image.fromarray(edited)])
    encoded = [encode_sample(processor, sample) for sample in (edit, draw_sample("Draw", picture(2)))]
    books, blocks = model.image_tokenizer.codebooks, code_blocks(model.image_tokenizer)
    whole = torch.zeros(1, 1, 16, 16)
    whole[..., :8, 8:] = 1
    cells = torch.cat([F.adaptive_max_pool2d(whole, (b.rows, b.columns)).flatten() for b in blocks])
    wanted = 1 + 8 * cells
    losses = []
    for inputs in (
        collate(encoded, pad_token_id=0).inputs,
        collate_packed([encoded], max_length=900, pad_token_id=0).inputs,
    ):
        if head == "next_scale" and len(losses):
            break  # takes no packed rows
        labels, positions = inputs["labels"], inputs.get("position_ids")
        with torch.no_grad():
            drawn = lay_images(model, inputs["target_images"], step_of(model, inputs))
            losses.append(model(**inputs, skip_logits=True, use_cache=False).loss)
        assert drawn.counts is not None and labels is not None and (positions is None or len(labels) == 1)
        torch.testing.assert_close(drawn.counts[0], wanted / wanted.mean())
        torch.testing.assert_close(
            drawn.counts[1], torch.ones(len(cells))
        )  # no picture before it, none of the sample before
    torch.testing.assert_close(losses[0], losses[-1], atol=1e-4, rtol=1e-4)
    # What counts is that code's own loss.
    steps, codes = torch.randn(1, model.visual_head.num_steps, model.visual_head.width), drawn.codes[:1].clone()
    for place in (0, len(cells) - 1):
        other, one = codes.clone(), torch.zeros(1, len(cells))
        other[0, place], one[0, place] = (codes[0, place] + 1) % 4, 1
        with torch.no_grad():
            first, second = (model.visual_head.code_losses(steps, c, model.image_tokenizer) for c in (codes, other))
        moved = {name: first[name] != second[name] for name in books}
        named = {name: of_book(one, name, model.image_tokenizer).bool() for name in books}
        assert sum(int(part.sum()) for part in named.values()) == 1
        assert all(moved[name][named[name]].all() for name in books)


def test_a_head_told_what_changes_draws_as_it_is_taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = drawing_model(tmp_path, "separate", head_options={"told_changes": True, "text_dropout": 0.0})
    head, tokenizer = model.visual_head, model.image_tokenizer
    head.changes.data *= 50  # as strong as what else is read
    source = np.full((16, 16, 3), 120, np.uint8)
    edited = source.copy()
    edited[:8, 8:] = (250, 0, 0)
    pictures = [Image.fromarray(source), Image.fromarray(edited)]
    prompt, whole = [Turn("user", f"{IMAGE_MARK}Edit")], torch.zeros(1, 1, 16, 16)
    whole[..., :8, 8:] = 1
    cells = F.adaptive_max_pool2d(whole, tokenizer.grid).flatten(1) > 0
    options = {"processor": processor, "images": [pictures[:1]], "temperature": 0}
    told = model.generate_images([prompt], changed=cells, **options).packed
    every = model.generate_images([prompt], **options).packed  # by itself, all of a picture is new
    assert not torch.equal(told, every)
    guided = model.generate_images([prompt], changed=cells, cfg_scale=2.0, **options)
    assert guided.packed.shape == told.shape
    inputs = batch(processor, Sample("e", [*prompt, Turn("assistant", IMAGE_MARK)], pictures))
    with pytest.raises(ConfigError, match="told_changes: drawn pictures came as stored codes"):
        model(**{**inputs, "target_images": told})
    monkeypatch.setattr("mllm.heads.codes.targets.codes_of", lambda *_: told)  # what it drew, as what it learns
    step = step_of(model, inputs)
    with torch.no_grad():
        drawn = lay_images(model, inputs["target_images"], step)
        features, _ = model.model.encode_images({"codes": inputs["pixel_values"]})
        embeddings = model.model.merge_images(step.input_ids, model.model.embed_tokens(step.input_ids), features)
        slots = step.inputs["slot_mask"]
        embeddings[slots] = step.inputs["slot_embeds"].to(embeddings)
        hidden = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        states = hidden[:, int(drawn.starts[0, 1]) :][:, : head.num_steps]
        (logits,) = head.logits(states, told, tokenizer).values()
    assert torch.equal(logits.argmax(-1), told)


def step_of(model: Any, inputs: dict[str, torch.Tensor]) -> Step:
    """The step that the model makes of its inputs."""
    pixels = {"codes": inputs["pixel_values"]}
    rest = (inputs.get("attention_mask"), inputs.get("position_ids"))
    return Step(inputs["input_ids"], inputs["labels"], *rest, pixels=pixels)


def test_dropped_text_is_gone_for_the_drawing(tmp_path: Path) -> None:
    model, processor = drawing_model(tmp_path, "vocabulary", head_options={"text_dropout": 0.999999})
    model.train()
    model.image_tokenizer.eval()
    losses = []
    for prompt in ("Draw a 3", "Draw a 7"):
        with torch.no_grad():
            losses.append(model(**batch(processor, draw_sample(prompt, picture(1)))).losses["draw/pixel"])
    assert torch.equal(losses[0], losses[1])


def test_an_image_that_is_not_learned_carries_no_loss(tmp_path: Path) -> None:
    model, processor = drawing_model(tmp_path, "separate")
    turns = [
        Turn("user", "Draw"),
        Turn("assistant", IMAGE_MARK, False),
        Turn("user", "What is it?"),
        Turn("assistant", "A seven"),
    ]
    sample = Sample("x", turns, [picture(1)])
    inputs = batch(processor, sample)
    output = model(**inputs)
    assert output.losses["draw/pixel"] == 0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.visual_head.heads.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.visual_head.aligners.parameters())  # it is read


def test_a_batch_without_drawings_still_reaches_the_head(tmp_path: Path) -> None:
    model, processor = drawing_model(tmp_path, "separate")
    model.train()
    model(**batch(processor, read_sample(picture(1)))).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.visual_head.parameters())


def test_spans_are_written_masked_and_never_cut(tmp_path: Path) -> None:
    _, processor = drawing_model(tmp_path, "separate", "illume")
    span = processor.span
    sample = Sample(
        "x", [Turn("user", "Draw <image_start>"), Turn("assistant", "Here: " + IMAGE_MARK + "!")], [picture(1)]
    )
    encoded = encode_sample(processor, sample)
    start = span.starts(encoded.input_ids)[0]
    assert len(span.starts(encoded.input_ids)) == 1, "a typed <image_start> stays text"
    assert torch.equal(encoded.input_ids[start : start + span.length], span.ids())
    assert torch.equal(encoded.labels[start : start + span.length], span.ids())
    assert encoded.num_images == 0 and encoded.targets.shape == (1, 3, 16, 16)
    cut = encode_sample(processor, sample, max_length=start + 5)
    assert len(cut) == start and cut.truncated and cut.targets is None
    with pytest.raises(DataError, match="has 3 codes, the model's tokenizer writes 20"):
        encode_sample(processor, draw_sample("Draw", torch.zeros(3, dtype=torch.int64)))
