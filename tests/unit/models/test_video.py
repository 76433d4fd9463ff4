import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mllm.data.collate import collate, collate_packed
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.models.build import build_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample, render_prompt
from mllm.types import IMAGE_MARK, Sample, Turn, Video, scene
from tests.helpers import TINY_CLIP, picture, tiny_model, tiny_spec
from tests.videos import painted, write_clip

STAMP = "at {seconds:.1f}s "


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 21))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), video={"frames": 3, "stamp": STAMP})


def sample(*visuals, answer="seven"):
    marks = "".join(IMAGE_MARK + "\n" for _ in visuals)
    return Sample("s", [Turn("user", f"{marks}What is shown?"), Turn("assistant", answer)], list(visuals))


def by_call(processor, text, **inputs):
    return processor(text=text, return_tensors="pt", padding=True, add_special_tokens=False, **inputs)


def frames_at(*numbers):
    return [Image.fromarray(painted(number)) for number in numbers]


def test_every_path_reads_the_same_tokens_and_pixels(parts, clip):
    """Training, a call with ``videos=``, messages with a video part, an evaluation's request: a video and a picture in one."""
    _, processor = parts
    encoded = encode_sample(processor, sample(Video(clip), picture(1)))
    prompt = render_prompt(processor, encoded_turns := sample(clip, picture(1)).turns[:1])
    assert prompt.count("<image>") == 2
    length = len(by_call(processor, prompt, images=[[Video(clip), picture(1)]])["input_ids"][0])
    typed = prompt.replace("<image>", "<video>", 1)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video", "path": clip},
                {"type": "image", "image": picture(1)},
                {"type": "text", "text": "What is shown?"},
            ],
        }
    ]
    ways = {
        "request": by_call(processor, [prompt], images=[[Video(clip), picture(1)]]),
        "videos": by_call(processor, [typed], images=[[picture(1)]], videos=[[clip]]),
        "flat": by_call(processor, typed, images=picture(1), videos=clip),
        "array": by_call(
            processor, typed, images=picture(1), videos=Video(np.stack([painted(k) for k in range(21)]), fps=10)
        ),
    }
    for name, inputs in ways.items():
        ids = inputs["input_ids"][0]
        assert torch.equal(ids, encoded.input_ids[:length]), name
        assert inputs["video_times"].tolist() == [[0, 1000, 2000], [-1, -1, -1]], name
        for key, pixels in encoded.pixels.items():
            # The clip's compression is not the array's: everything else is the same path.
            assert torch.allclose(inputs[key], pixels, atol=0.2 if name == "array" else 0), (name, key)
    chat = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tidy = by_call(
        processor,
        [render_prompt(processor, [Turn("user", f"{IMAGE_MARK}{IMAGE_MARK}\nWhat is shown?")])],
        images=[[Video(clip), picture(1)]],
    )
    assert torch.equal(chat["input_ids"], tidy["input_ids"]) and torch.equal(chat["pixel_values"], tidy["pixel_values"])
    assert encoded_turns[0].content.count(IMAGE_MARK) == 2
    text = processor.tokenizer.decode(encoded.input_ids)
    told = [text.index(f"at {second}.0s <image>") for second in range(3)]
    assert told == sorted(told)
    assert (encoded.labels[: encoded.input_ids.tolist().index(processor.image_token_id)] == -100).all()


def test_a_video_is_its_frames(tmp_path, clip):
    """Without text between them, frames of a video lie as pictures beside one another do, and the model answers alike."""
    model, processor = tiny_model(tmp_path, video={"frames": 3})
    film = by_call(processor, "<video> and <image>", videos=Video(frames_at(0, 10, 20), fps=1), images=picture(2))
    stills = by_call(processor, "<image><image><image> and <image>", images=[*frames_at(0, 10, 20), picture(2)])
    assert torch.equal(film["input_ids"], stills["input_ids"])
    for key in processor.pixel_keys.values():
        assert torch.equal(film[key], stills[key])
    with torch.no_grad():
        torch.testing.assert_close(model(**film).logits, model(**stills).logits, atol=1e-5, rtol=1e-4)
        other = by_call(processor, "<video> and <image>", videos=Video(frames_at(20, 10, 0), fps=1), images=picture(2))
        assert not torch.allclose(model(**other).logits, model(**stills).logits, atol=1e-3)


def test_batches_answer_as_single_prompts_do(parts, clip):
    model, processor = parts
    prompts = [
        ("<video>\nWhat?", [Video(clip)]),
        ("Just words, and rather many of them.", []),
        ("<image> and <video>", [picture(3), Video(clip, end=0.05)]),
    ]
    texts = [text.replace("<video>", "<image>") for text, _ in prompts]
    together = by_call(processor, texts, images=[visuals for _, visuals in prompts])
    options = {"max_new_tokens": 6, "do_sample": False}
    answers = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    beams = model.generate(**together, **options, num_beams=2)
    assert len(beams) == 3
    for number, (_, visuals) in enumerate(prompts):
        alone = by_call(processor, texts[number], **({"images": [visuals]} if visuals else {}))
        answer = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert answer.tolist() == answers[number, : len(answer)].tolist()


def test_samples_with_videos_are_padded_and_packed(parts, clip):
    model, processor = parts
    samples = [
        encode_sample(processor, s)
        for s in (sample(Video(clip)), sample(picture(4)), sample(Video(clip, end=0.1), picture(5)))
    ]
    assert [s.num_images for s in samples] == [1, 1, 2]
    pad = processor.tokenizer.pad_token_id
    padded = collate(samples, pad_token_id=pad)
    packed = collate_packed([samples], max_length=sum(map(len, samples)) + 5, pad_token_id=pad)
    assert padded.num_views == packed.num_views == 3 + 1 + 3
    assert padded.inputs["video_times"].tolist() == [[0, 1000, 2000], [-1, -1, -1], [0, 100, -1], [-1, -1, -1]]
    with torch.no_grad():
        apart = [model(**collate([s], pad_token_id=pad).inputs).loss * s.num_supervised for s in samples]
        whole = model(**padded.inputs).loss * padded.num_supervised
    torch.testing.assert_close(whole, torch.stack(apart).sum(), atol=1e-4, rtol=1e-4)
    model.train()
    try:
        model.zero_grad()
        model(**padded.inputs).loss.backward()
        model(**collate([encode_sample(processor, sample())], pad_token_id=pad).inputs).loss.backward()
        assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    finally:
        model.eval()


def test_a_span_is_never_cut(parts, clip):
    _, processor = parts
    long = encode_sample(processor, sample(Video(clip)))
    with pytest.raises(DataError, match=r"sample 's': \d+ tokens do not fit max_length"):
        encode_sample(processor, sample(Video(clip)), max_length=len(long) // 2)


def test_saved_and_opened_again(tmp_path, parts, clip):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, opened = (
        MllmForConditionalGeneration.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert again.config.video["frames"] == 3 and opened.rules.video == processor.rules.video
    inputs = by_call(opened, "<video>\nWhat?", videos=clip)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)


def rows(tmp_path, *lines, **spec):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_source(DatasetSpec(name="d", path=str(tmp_path / "rows.jsonl"), **spec))


def talk(question):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]


def test_rows_of_every_format_hold_videos(tmp_path, parts, clip):
    _, processor = parts
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "frames").mkdir()
    for k in range(3):
        Image.fromarray(painted(k)).save(tmp_path / "frames" / f"{k}.png")
    user = {"role": "user", "content": "<image> then <video>?"}
    found = [
        *rows(
            tmp_path,
            {"id": 0, "video": clip, "conversations": talk("<video>\nWhat?")},
            {"id": 1, "video": clip, "conversations": talk("<image>\nWhat?")},
            {"id": 2, "video": clip, "conversations": talk("What?")},
            {"id": 3, "videos": [clip], "image": "a.png", "conversations": talk("<image> then <video>?")},
            {"id": 4, "video": {"path": "frames", "fps": 2}, "conversations": talk("<video>?")},
            {
                "id": 5,
                "video": {"frames": ["frames/2.png", "frames/0.png"], "fps": 1},
                "conversations": talk("<video>?"),
            },
            format="llava",
        ),
        *rows(
            tmp_path,
            {"videos": [clip], "images": ["a.png"], "messages": [user, {"role": "assistant", "content": "a"}]},
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "video", "video": clip, "end": 1.0}, {"type": "text", "text": "?"}],
                    },
                    {"role": "assistant", "content": "a"},
                ]
            },
            format="messages",
        ),
    ]
    kinds = ["".join("V" if isinstance(v, Video) else "i" for v in s.images) for s in found]
    assert kinds == ["V", "V", "V", "iV", "V", "V", "iV", "V"]
    times = [encode_sample(processor, s).extras["video_times"][-1].tolist() for s in found]
    whole = [0, 1000, 2000]
    assert times == [whole, whole, whole, whole, [0, 500, 1000], [0, 1000], whole, [0, 500, 1000]]
    for bad, told in [
        (
            {"video": clip, "conversations": talk("<video> <video>")},
            "2 <video> and 0 <image> placeholders of the user for 1 videos",
        ),
        (
            {"video": {"fps": 3}, "conversations": talk("<video>")},
            "d, sample '0' .row 0.: a video entry has none of frames, bytes, path",
        ),
    ]:
        with pytest.raises((AlignmentError, DataError), match=told):
            rows(tmp_path, bad, format="llava")[0]


def test_what_takes_no_video_says_so(tmp_path, parts, clip):
    _, processor = parts
    with pytest.raises(AlignmentError, match="1 videos more than <video> placeholders"):
        by_call(processor, "<video>?", videos=[clip, clip])
    for videos in ([clip], None):
        with pytest.raises(AlignmentError, match="text 0 has more <video> placeholders than there are videos"):
            by_call(processor, "<video> <video>?", videos=videos)
    said = processor.apply_chat_template([{"role": "user", "content": "typed <video>"}], tokenize=False)
    assert "<video>" not in said and "< video>" in said
    _, stills = tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="videos: this model takes none"):
        by_call(stills, "<video>?", videos=clip)
    with pytest.raises(DataError, match="sample 's', image 0 is a video, and this model takes none"):
        encode_sample(stills, sample(Video(clip)))
    for changes, told in [
        ({"views": {"type": "dual_perspective"}}, "views of type dual_perspective takes no video"),
        ({"views": {"type": "tiles", "thumbnail_only": ["detail"]}}, "views.thumbnail_only takes no video"),
        ({"router": {"type": "gate", "experts": ["detail"]}}, "a router takes no video"),
    ]:
        with pytest.raises(ConfigError, match=told):
            build_config(tiny_spec(str(tmp_path), video={"frames": 2}, **changes))


TINY_VGGT = {
    "type": "vggt",
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 7,
    "image_size": 28,
    "patch_embed": "conv",
    "num_registers": 1,
}

_VIEWS = {"width": 16, "num_heads": 2, "patch_size": 7, "image_size": 28}
GEOMETRY = [
    TINY_VGGT,
    {"type": "depth_anything_3", **_VIEWS, "depth": 2, "across_from": 1, "position_size": 28},
    {"type": "pi3", **_VIEWS, "depth": 1, "dinov2_depth": 1, "dinov2_image_size": 28},
    {
        "type": "mapanything",
        **_VIEWS,
        "depth": 2,
        "dinov2_width": 16,
        "dinov2_depth": 1,
        "dinov2_heads": 2,
        "dinov2_image_size": 28,
    },
]


@pytest.mark.parametrize("geometry", GEOMETRY, ids=lambda one: one["type"])
def test_frames_are_taken_together_and_geometry_sees_the_whole_scene(geometry, tmp_path):
    encoders = {"semantic": dict(TINY_CLIP), "geometry": dict(geometry)}
    spatial = {"encoders": encoders, "connector": {"type": "spatial_mllm"}}
    with pytest.raises(ConfigError, match=r"takes 2 frames together, of videos that are seen once; add model\.video"):
        build_config(tiny_spec(str(tmp_path), **spatial))
    model, processor = tiny_model(tmp_path, video={"frames": 3, "stamp": "{seconds:.0f}s "}, **spatial)
    film = Video(frames_at(1, 2, 4), fps=1)
    batch = by_call(processor, "<image> and <video>", images=picture(1), videos=film)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 4 + 2 * 4, (
        "a picture, and three frames in two groups"
    )
    assert [len(batch[key]) for key in processor.pixel_keys.values()] == [2 + 4] * 2
    encoded = encode_sample(processor, sample(film))
    assert processor.tokenizer.decode(encoded.input_ids).count("2s <image>") == 1, (
        "of each group the first frame's time"
    )

    def tokens(batch):
        with torch.no_grad():
            return model.get_image_features(**{k: v for k, v in batch.items() if "pixel" in k or k == "video_times"})

    whole = tokens(batch).pooler_output
    assert [len(part) for part in whole] == [4, 8]
    alone = tokens(by_call(processor, "<image>", images=picture(1))).pooler_output[0]
    torch.testing.assert_close(whole[0], alone, atol=1e-5, rtol=1e-4)
    changed = Video([*frames_at(1, 2), picture(9, size=(128, 48))], fps=1)
    moved = tokens(by_call(processor, "<image> and <video>", images=picture(1), videos=changed)).pooler_output
    assert torch.equal(moved[0], whole[0]), "another visual is another scene"
    assert not torch.equal(moved[1][:4], whole[1][:4]), "the first frames' geometry knows of the last frame"
    model.train()(**collate([encoded], pad_token_id=0).inputs).loss.backward()
    model(**collate([encode_sample(processor, sample())], pad_token_id=0).inputs).loss.backward()


@pytest.mark.parametrize("geometry", GEOMETRY, ids=lambda one: one["type"])
def test_all_pictures_of_a_scene_are_seen_together(geometry, tmp_path):
    """More of them than the section's frames, in their order; those that stand alone are no scene."""
    encoders = {"semantic": dict(TINY_CLIP), "geometry": dict(geometry)}
    model, processor = tiny_model(tmp_path, video={"frames": 2}, encoders=encoders)
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.encoders["geometry"].named_parameters():
            if name.endswith("gamma"):  # 0.01 at the start: frames would hardly see each other
                parameter.fill_(1.0)
    views = [picture(seed) for seed in range(3)]
    room = by_call(processor, "<image>?", images=[[scene(views)]])
    alone = by_call(processor, "<image><image><image>?", images=views)
    assert torch.equal(room["input_ids"], alone["input_ids"])
    for key in processor.pixel_keys.values():
        assert torch.equal(room[key], alone[key])
    with torch.no_grad():
        together, apart, turned = (
            model(**batch).logits
            for batch in (room, alone, by_call(processor, "<image>?", images=[[scene(views[::-1])]]))
        )
    assert not torch.allclose(together, apart, atol=1e-3), "the geometry of one picture knows of the others"
    assert not torch.allclose(together, turned, atol=1e-3)
    with pytest.raises(DataError, match="frame 1: is 50 × 30, the first 40 × 30"):
        by_call(processor, "<image>?", images=[[scene([picture(1), picture(2, size=(50, 30))])]])


def test_the_pictures_of_a_scene_are_told_with_the_times_they_were_taken_at(tmp_path):
    _, processor = tiny_model(tmp_path, video={"frames": 4, "stamp": "{seconds:.1f}s: "})
    views = [picture(seed) for seed in range(3)]
    times = (0.0, 1.5, 4.0)
    room = by_call(processor, "<image>?", images=[[scene(views, times)]])
    assert room["video_times"].tolist() == [[0, 1500, 4000]]
    text = processor.tokenizer.decode(room["input_ids"][0])
    assert [f"{time:.1f}s: " in text for time in times] == [True] * 3, text
    film = Video({"frames": views, "fps": 2.0}, frames=(0, 1, 2))
    even = by_call(processor, "<image>?", images=[[scene(views, [0, 0.5, 1.0])]])
    assert torch.equal(even["input_ids"], by_call(processor, "<image>?", images=[[film]])["input_ids"])
    for wrong, words in (
        (scene(views), "nothing says when these frames are; give fps, or the seconds of each"),
        (scene(views, [0, 1]), "2 seconds for 3 frames"),
        (scene(views, [0, 2, 1]), "none before the one before it"),
        (replace(film, seconds=times), "the video tells its own times"),
    ):
        with pytest.raises(DataError, match=words):
            by_call(processor, "<image>?", images=[[wrong]])


def test_a_scene_needs_no_times_where_a_section_counts_frames_by_the_second(tmp_path):
    _, processor = tiny_model(tmp_path, video={"fps": 1, "max_frames": 2})
    views = [picture(seed) for seed in range(3)]
    room = by_call(processor, "<image>?", images=[[scene(views)]])
    assert room["video_times"].tolist() == [[0, 1, 2]], "all are seen, whatever the section says of frames"
    with pytest.raises(DataError, match="give fps"):
        by_call(processor, "<image>?", images=[[Video(views)]])


def test_video_benchmarks_are_asked_with_the_models_own_frames(tmp_path, parts, clip):
    """VSI-Bench from its official layout: one visual a question, and the controls at the same number of tokens."""
    from mllm.eval.generators.hf import HFGenerator
    from mllm.eval.predictions import read_predictions
    from mllm.eval.run import evaluate, report_again

    model, processor = parts
    folder = tmp_path / "data"
    (folder / "scannet").mkdir(parents=True)
    (folder / "scannet/s1.mp4").write_bytes(Path(clip).read_bytes())
    row = {
        "id": 0,
        "dataset": "scannet",
        "scene_name": "s1",
        "question_type": "object_counting",
        "question": "How many?",
    }
    (folder / "test.jsonl").write_text(json.dumps(row | {"options": None, "ground_truth": "5"}) + "\n")
    generator = HFGenerator(model, processor, batch_size=1)
    result = evaluate(generator, ["vsibench"], tmp_path / "out", data={"vsibench": folder}, blind=True, progress=False)[
        "vsibench"
    ]
    assert set(result.frames) == {"frames_frozen", "frames_shuffled", "frames_reversed"}
    again = report_again(tmp_path / "out", show=False)["vsibench"]
    assert {name: way.score for name, way in again.frames.items()} == {n: way.score for n, way in result.frames.items()}
    ways = [result, result.blind, *result.frames.values()]
    rows = [read_predictions(Path(way.path))[0] for way in ways]
    assert all(row["prompt"].count("<image>") == 1 and not row.get("error") for row in rows)
    assert len({row["num_prompt_tokens"] for row in rows}) == 1
    assert len({row["images"][0] for row in rows}) == 5, "no answer is taken for another way's"
    frames = by_call(processor, "<video>", videos=clip)["input_ids"].shape[1]
    assert rows[0]["num_prompt_tokens"] > frames > 3 * 16
