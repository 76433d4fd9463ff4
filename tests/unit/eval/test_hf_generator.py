"""Does a Hugging Face model answer the same alone and in batches, for LLaVA and for our own class?"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import ConfigError, UnavailableError
from mllm.eval.generators.base import Generator, cut_at_stops, hf_messages
from mllm.eval.generators.hf import HFGenerator, weights_hash
from mllm.eval.run import run_eval
from mllm.eval.settings import EvalSettings
from mllm.types import IMAGE_MARK, Request, Turn
from tests.helpers import tiny_model
from tests.unit.eval.test_runner import make_data

SENTENCE = "how many red blue dots are there in this picture answer now please one two three four five six seven"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def llava():
    """A LLaVA of a few thousand weights with a word tokenizer, made in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    template = (
        "<s> {% for m in messages %}{{ 'USER:' if m['role'] == 'user' else 'ASSISTANT:' }} {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=32,
        ),
        text_config=LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(special) + len(WORDS), initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=4, vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval(), processor


def questions(count: int = 14) -> list[Request]:
    """Prompts of differing length, with zero, one and two pictures."""
    generator = np.random.default_rng(3)
    made = []
    for k in range(count):
        pictures = [
            Image.fromarray(generator.integers(0, 255, (20, 24, 3), np.uint8)) for _ in range((1, 1, 2, 0, 1)[k % 5])
        ]
        words = " ".join(generator.choice(WORDS, 3 + 2 * k % 9))
        turns = [Turn("user", IMAGE_MARK * len(pictures) + ("\n" if pictures else "") + words)]
        made.append(Request(f"q{k}", turns, pictures, {"max_new_tokens": 8, "do_sample": False}))
    return made


def answers(generator, requests) -> dict[str, str]:
    found = list(generator.generate(iter(requests)))
    assert sorted(r.id for r in found) == sorted(r.id for r in requests) and all(r.error is None for r in found), found
    return {response.id: response.text for response in found}


def test_llava_answers_alone_as_in_batches_of_any_size(llava):
    alone = answers(HFGenerator(*llava, batch_size=1), questions())
    assert len(set(alone.values())) > 5, "a model that always says the same would hide a mistake"
    for size in (2, 5, 16):
        assert answers(HFGenerator(*llava, batch_size=size), questions()) == alone
    assert isinstance(HFGenerator(*llava), Generator)


def test_answers_equal_plain_generate(llava):
    model, processor = llava
    request = questions(1)[0]
    prompt = processor.apply_chat_template(hf_messages(request.turns), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompt, images=request.images, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    response = next(iter(HFGenerator(model, processor).generate([request])))
    assert response.text == expected and response.prompt == prompt and response.num_tokens > 0
    assert response.num_prompt_tokens == inputs["input_ids"].shape[1]


def test_the_pictures_matter_and_longest_prompts_come_first(llava):
    first, other = questions(1)[0], questions(1)[0]
    other.images = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (20, 24, 3), np.uint8)) for k in (9,)]
    generator = HFGenerator(*llava, batch_size=1)
    assert answers(generator, [first]) != answers(generator, [other])
    order = [response.id for response in HFGenerator(*llava, batch_size=1).generate(iter(questions(5)))]
    assert order[0] == "q2" and order[-1] == "q3", "two pictures first, none last"


def test_requests_with_other_settings_are_not_batched_together(llava):
    mixed = questions(6)
    for request in mixed[::2]:
        request.options = {"max_new_tokens": 2, "do_sample": False}
    generator = HFGenerator(*llava, batch_size=6)
    lengths = {response.id: response.num_tokens for response in generator.generate(iter(mixed))}
    assert all(lengths[request.id] <= 2 for request in mixed[::2]) and max(lengths.values()) > 2


def test_sampling_is_seeded_per_request_and_leaves_the_global_state(llava):
    sampled = questions(4)
    for request in sampled:
        request.options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "seed": 1}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = answers(HFGenerator(*llava, batch_size=4), sampled)
    assert torch.equal(torch.rand(1), expected)
    assert answers(HFGenerator(*llava, batch_size=1), sampled[::-1]) == first
    for request in sampled:
        request.options = request.options | {"seed": 2}
    assert answers(HFGenerator(*llava, batch_size=4), sampled) != first


def test_one_bad_request_does_not_stop_its_batch(llava):
    requests = questions(5)
    requests[1].images = []  # one placeholder, no picture
    found = {response.id: response for response in HFGenerator(*llava, batch_size=5).generate(iter(requests))}
    assert found["q1"].error and all(found[f"q{k}"].error is None for k in (0, 2, 3, 4))


def test_it_is_said_once_that_batches_are_asked_one_by_one(ours, caplog):
    requests = questions(5) + [replace(request, id=f"{request.id} again") for request in questions(5)]
    for number in (1, 6):
        requests[number].images = ["nothing.png"]
    found = list(HFGenerator(*ours, batch_size=5).generate(iter(requests)))
    assert sorted(response.id for response in found if response.error) == ["q1", "q1 again"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("a batch of 5 cannot be answered together") and told.endswith("one by one, which is slower")


def test_a_batch_has_no_more_pictures_than_the_processor_takes(ours, monkeypatch, caplog):
    """Once alone each, silently, where a batch of 64 questions about 16 frames was asked."""
    model, processor = ours
    alone = answers(HFGenerator(model, processor, batch_size=1), questions(6))
    monkeypatch.setattr(processor.image_processor, "max_images", 3)
    generator, asked = HFGenerator(model, processor, batch_size=6), []
    monkeypatch.setattr(
        generator,
        "_forward",
        lambda r, p: asked.append([len(q.images) for q in r]) or HFGenerator._forward(generator, r, p),
    )
    assert answers(generator, questions(6)) == alone and not caplog.records
    assert all(sum(pictures) <= 3 for pictures in asked) and max(map(len, asked)) > 1, asked


def test_the_fingerprint_sees_every_weight(llava):
    model, processor = llava
    before = HFGenerator(model, processor).fingerprint()
    assert before == HFGenerator(model, processor).fingerprint() and "float32" in before
    hashed = weights_hash(model)
    parameter = next(p for name, p in model.named_parameters() if "multi_modal_projector" in name)
    with torch.no_grad():
        parameter.view(-1)[-1] += 1.0
    try:
        assert weights_hash(model) != hashed and HFGenerator(model, processor).fingerprint() != before
    finally:
        with torch.no_grad():
            parameter.view(-1)[-1] -= 1.0


def test_stops_and_message_parts():
    assert cut_at_stops("a b\nc", ["\n", "c"]) == "a b" and cut_at_stops("abc", None) == "abc"
    turns = [Turn("user", f"{IMAGE_MARK}{IMAGE_MARK}\nlook at {IMAGE_MARK} and {IMAGE_MARK}")]
    kinds = [part["type"] for part in hf_messages(turns)[0]["content"]]
    assert kinds == ["image", "image", "text", "image", "text", "image"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tokenizer"))


def test_our_model_answers_alone_as_in_batches_of_any_size(ours):
    alone = answers(HFGenerator(*ours, batch_size=1), questions(10))
    assert len(set(alone.values())) > 3
    for size in (3, 8):
        assert answers(HFGenerator(*ours, batch_size=size), questions(10)) == alone


@pytest.mark.parametrize(
    "views", [{}, {"views": {"type": "tiles", "dialect": "internvl", "max_tiles": 4}}], ids=["single", "tiles"]
)
def test_pictures_asked_about_again_are_not_encoded_again_and_answered_the_same(views, tmp_path):
    """Two 'tasks' over the same pictures: the second one encodes nothing, whatever the batches; so little memory that pictures go
    changes no answer either."""
    model, processor = tiny_model(tmp_path / "tokenizer", **views)
    tower, first = model.model.vision_tower, questions(10)
    second = [
        Request(f"b{r.id}", [Turn("user", f"{r.turns[0].content} again")], r.images, r.options) for r in questions(10)
    ]
    plain = HFGenerator(model, processor, batch_size=3)
    expected = answers(plain, first) | answers(plain, second)
    assert len(set(expected.values())) > 3 and plain.kept is None

    def encoded(generator, requests) -> tuple[dict[str, str], int]:
        tower.num_encoded.clear()
        found = answers(generator, requests)
        return found, sum(tower.num_encoded.values())

    keeping = HFGenerator(model, processor, batch_size=3, picture_cache=64)
    said, count = encoded(keeping, first)
    again, none = encoded(keeping, second)
    assert said | again == expected and count > 0 and none == 0
    assert (keeping.kept.misses, keeping.kept.hits) == (10, 10), "ten pictures in ten questions, each asked about twice"
    small = HFGenerator(model, processor, batch_size=3, picture_cache=64)
    small.kept._room = int(2.5 * keeping.kept._used / 10)
    said, _ = encoded(small, first)
    again, some = encoded(small, second)
    assert said | again == expected and some > 0 and small.kept.megabytes * 2**20 <= small.kept._room


def test_a_model_with_a_router_keeps_no_pictures(tmp_path):
    from mllm.eval.generators.kept_pictures import KeptPictures

    model, processor = tiny_model(tmp_path / "tokenizer")
    assert KeptPictures.fit(model) and HFGenerator(model, processor, picture_cache=1).kept is not None
    model.model.vision_tower.experts = ("clip",)
    assert HFGenerator(model, processor, picture_cache=1).kept is None


def test_our_model_sees_the_processors_settings_in_the_fingerprint(ours):
    from mllm.eval.generators.hf import processor_hash

    _, processor = ours
    before, template = processor_hash(processor), processor.chat_template
    processor.chat_template = template + " "
    assert processor_hash(processor) != before
    processor.chat_template = template
    assert processor_hash(processor) == before


def test_run_eval_takes_a_checkpoint_folder_to_scores_and_reports(ours, tmp_path, capsys):
    model, processor = ours
    model.save_pretrained(tmp_path / "run/final")
    processor.save_pretrained(tmp_path / "run/final")
    for name in ("demo_charts", "demo_digits"):
        make_data(tmp_path / name, 6)
    places = {name: str(tmp_path / name) for name in ("demo_charts", "demo_digits")}
    results = run_eval(
        str(tmp_path / "run/final"), ["demo"], EvalSettings(batch_size=4, blind=True, check_batch=True, data_dirs=places, limit=4,
        overrides=["demo_digits.generation.max_new_tokens=3"]),
    )  # fmt: skip
    assert list(results) == ["demo_charts", "demo_digits"] and 0 <= results["demo_digits"].blind_score <= 1
    folder = tmp_path / "run/eval"
    stored = json.loads((folder / "results.json").read_text())
    assert stored["batch_differences"] == [] and stored["tasks"]["demo_charts"]["num_samples"] == 4
    assert (folder / "report.html").exists() and (folder / "report.md").exists()
    assert "the same answers alone and in batches" in capsys.readouterr().out
    first = json.loads((folder / "demo_charts.jsonl").read_text().splitlines()[0])
    assert first["prompt"].startswith("<|im_start|>user\n<image>\nHow many ")
    with pytest.raises(ConfigError, match="not among the tasks"):
        run_eval(str(tmp_path / "run/final"), ["demo_digits"], EvalSettings(data_dirs={"demo_chart": "x"}))
    digits = [json.loads(line) for line in (folder / "demo_digits.jsonl").read_text().splitlines()]
    assert all(row["num_tokens"] <= 3 for row in digits)
    with pytest.raises(ConfigError, match=r"expected task\.key=value"):
        run_eval("nowhere", ["demo_digits"], EvalSettings(overrides=["demo_chart.version=2"]))
    with pytest.raises(ConfigError, match="unknown task 'demo_digit'"):
        run_eval("nowhere", ["demo_digit"])


@pytest.mark.parametrize("kind", ["llava", "ours"])
def test_an_answer_has_the_probability_that_the_model_gives_it(kind, llava, tmp_path):
    """The sum over all tokens of the reply with its end, as transformers' own scores of a generation give it."""
    model, processor = llava if kind == "llava" else tiny_model(tmp_path / "tokenizer")
    generator = HFGenerator(model, processor, batch_size=4)
    requests = questions(10)
    found = {response.id: response for response in generator.generate(iter(requests))}
    ended = 0
    for request in requests:
        inputs = generator._encode([request], [generator.render(request)])
        made = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        reply = made.sequences[0, inputs["input_ids"].shape[1] :]
        steps = torch.stack([step[0].float().log_softmax(-1) for step in made.logits])
        expected = float(steps.gather(1, reply[:, None]).sum())
        assert found[request.id].logprob == pytest.approx(expected, abs=2e-4)
        ended += len(reply) < 8
    assert ended < 10
    (sampled,) = generator.generate(
        [Request("s", requests[0].turns, requests[0].images, {"do_sample": True, "max_new_tokens": 4})]
    )
    assert sampled.logprob is None, "a sampled answer is one of many"


def test_a_batch_that_the_gpu_cannot_hold_is_halved_and_no_answer_changes(llava, monkeypatch, caplog):
    alone = answers(HFGenerator(*llava, batch_size=1), questions())
    generator = HFGenerator(*llava, batch_size=8)
    sizes, forward = [], generator._forward

    def small_gpu(requests, prompts):
        sizes.append(len(requests))
        if len(requests) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(requests, prompts)

    monkeypatch.setattr(generator, "_forward", small_gpu)
    room = 3
    with caplog.at_level("WARNING"):
        assert answers(generator, questions()) == alone
    assert generator.batch_size <= room and sizes.count(8) == 1
    assert caplog.text.count("going on with batches of 2") == 1
    room = 0
    with pytest.raises(UnavailableError, match=r"out of GPU memory on sample .* alone"):
        answers(generator, questions())
