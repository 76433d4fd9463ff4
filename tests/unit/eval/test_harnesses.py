"""Do our models answer the same inside lmms-eval and VLMEvalKit as in our own harness?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.checkpoint import open_generator
from mllm.eval.harnesses.messages import frames_for, interleaved, turns_and_images, with_images
from mllm.eval.harnesses.vlmevalkit import MllmVLMEval, main, message_parts
from mllm.eval.predictions import read_predictions
from mllm.eval.run import evaluate
from mllm.types import IMAGE_MARK, Request, Turn, Video
from tests.helpers import picture, tiny_model
from tests.unit.eval.test_runner import make_data

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outward")
    model, processor = tiny_model(folder / "tokenizer")
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    return folder / "final"


@pytest.fixture(scope="module")
def asked(checkpoint, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder of questions in the demo's format, and our own harness' answers by id."""
    folder = make_data(tmp_path_factory.mktemp("data") / "d", 10)
    generator = open_generator(str(checkpoint), batch_size=4, device="cpu")
    evaluate(generator, ["demo_charts"], folder / "ours", data={"demo_charts": folder}, progress=False)
    return folder, {row["id"]: row["output"] for row in read_predictions(folder / "ours/demo_charts.jsonl")}


def test_messages_keep_the_order_of_words_and_pictures():
    first, second = picture(1), picture(2)
    content, images = interleaved([("image", first), ("text", "Left or"), ("image", second), ("text", "\nright?")], 4)
    assert content == f"{IMAGE_MARK}\nLeft or{IMAGE_MARK}\nright?"
    assert [image.tobytes() for image in images] == [first.tobytes(), second.tobytes()]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "url": first}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "video", "url": [first, second]}, {"type": "text", "text": "and?"}]},
    ]
    turns, images = turns_and_images(messages, 4)
    assert turns == [
        Turn("system", "Be brief."), Turn("user", f"{IMAGE_MARK}\nwhat?"), Turn("assistant", "a cat"),
        Turn("user", f"{IMAGE_MARK * 2}\nand?"),
    ]  # fmt: skip
    assert len(images) == 3
    assert with_images("A <image> B <image>", 2) == f"A {IMAGE_MARK} B {IMAGE_MARK}"
    assert with_images("A <image> B", 2) == f"{IMAGE_MARK * 2}\nA <image> B" and with_images("A", 0) == "A"
    films = [("video", [first, second]), ("text", "and?")]
    content, (film,) = interleaved(films, frames_for(SimpleNamespace(takes_video=True), None))
    assert content == f"{IMAGE_MARK}\nand?" and isinstance(film, Video), (
        "a model that chooses frames is given the whole"
    )
    assert frames_for(SimpleNamespace(), None) == 8 and frames_for(SimpleNamespace(takes_video=False), 4) == 4
    with pytest.raises(ConfigError, match="frames=4: this model sees videos whole"):
        frames_for(SimpleNamespace(takes_video=True), 4)
    with pytest.raises(UnavailableError, match="'audio': this model reads text, pictures and videos"):
        turns_and_images([{"role": "user", "content": [{"type": "audio", "url": "x"}]}], 4)


def test_vlmevalkit_messages_in_all_their_forms(tmp_path):
    path = str(tmp_path / "a b.png")
    picture(3).save(path)
    assert message_parts("hi") == [("text", "hi")]
    assert message_parts({"type": "image", "value": path}) == [("image", path)]
    assert message_parts([path, "what is nowhere.png?", "nowhere.png", "x" * 5000]) == [
        ("image", path), ("text", "what is nowhere.png?"), ("text", "nowhere.png"), ("text", "x" * 5000),
    ]  # fmt: skip
    parts = [{"type": "image", "value": path}, {"type": "text", "value": path, "role": "user"}]
    assert message_parts(parts) == [("image", path), ("text", path)], "a text part stays text"
    for wrong, words in (([], "got list"), (["a", {}], "got list"), ({"value": 1}, "needs type and value")):
        with pytest.raises(DataError, match=words):
            message_parts(wrong)
    with pytest.raises(UnavailableError, match="'audio': this model reads text, image, video"):
        message_parts({"type": "audio", "value": "x.wav"})


def test_vlmevalkit_wrapper_answers_as_our_harness_does(checkpoint, asked):
    folder, ours = asked
    model = MllmVLMEval(str(checkpoint), device="cpu", max_new_tokens=16)
    model.set_dump_image(lambda line: [line["path"]])
    assert not model.use_custom_prompt("MME") and model.dump_image({"path": "x"}, "MME") == ["x"]
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for row in rows:
        struct = [{"type": "image", "value": str(folder / row["image"])}, {"type": "text", "value": row["question"]}]
        assert model.generate(message=struct, dataset="demo") == ours[row["id"]]
    assert len(set(ours.values())) > 1, "the answers depend on the question"
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "value": str(folder / "0.png")}, {"type": "text", "value": "a?"}],
        },
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    turns = [Turn("user", f"{IMAGE_MARK}\na?"), Turn("assistant", "b"), Turn("user", "c?")]
    request = Request("r", turns, [Image.open(folder / "0.png")], {"max_new_tokens": 16, "do_sample": False})
    assert model.chat(talk, dataset="demo") == next(iter(model.generator.generate([request]))).text
    with pytest.raises(DataError, match=r"nowhere\.png"):
        model.generate({"type": "image", "value": str(folder / "nowhere.png")})


def test_vlmevalkit_is_started_with_the_checkpoint_in_its_table(checkpoint, asked, tmp_path, monkeypatch):
    """A stand-in checkout: a table of models and a run.py that asks the named one, as VLMEvalKit's own do."""
    folder, ours = asked
    (tmp_path / "vlmeval").mkdir()
    (tmp_path / "vlmeval/__init__.py").write_text("")
    (tmp_path / "vlmeval/config.py").write_text("supported_VLM = {}\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "name = sys.argv[sys.argv.index('--model') + 1]\nmodel = supported_VLM[name](device='cpu', max_new_tokens=16)\n"
        "print(name, sys.argv[-1], repr(model.generate(sys.argv[-2:], dataset='X')))\n"
    )
    command = [sys.executable, "-m", "mllm.eval.harnesses.vlmevalkit", str(checkpoint), str(tmp_path / "run.py")]
    done = subprocess.run(
        [*command, "--data", str(folder / "0.png"), "How many 0?"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    name = "-".join(checkpoint.parts[-2:])
    assert done.stdout.strip().endswith(f"{name} How many 0? {ours['q0']!r}")
    with pytest.raises(ConfigError, match="no such file; give the run"):
        main([str(checkpoint), str(tmp_path / "nowhere.py")])


TASK = """
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
UTILS = """
from PIL import Image


def visual(doc):
    return [Image.open({folder!r} + "/" + doc["image"]).convert("RGB")]
"""


@pytest.mark.slow
def test_lmms_eval_finds_the_model_and_gets_our_answers(checkpoint, asked, tmp_path):
    """The documented command, in a process of its own; the entry point that pyproject.toml declares is put on the path,
    so that the test does not depend on when the package was installed."""
    pytest.importorskip("lmms_eval")
    folder, ours = asked
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    place = tmp_path / "site/entry-0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: entry\nVersion: 0\n")
    entries = "".join(f"{name} = {target}\n" for name, target in declared.items())
    (place / "entry_points.txt").write_text(f"[lmms_eval.models]\n{entries}")
    (tmp_path / "task").mkdir()
    (tmp_path / "task/local.yaml").write_text(TASK.format(rows=folder / "test.jsonl"))
    (tmp_path / "task/utils.py").write_text(UTILS.format(folder=str(folder)))
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "mllm", "--model_args", f"pretrained={checkpoint}",
        "--tasks", "local_questions", "--include_path", str(tmp_path / "task"), "--batch_size", "4", "--device", "cpu",
        "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]), "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (samples,) = (tmp_path / "out").glob("*/*_samples_local_questions.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    theirs = {f"q{row['doc_id']}": row["filtered_resps"] for row in rows}
    theirs = {name: text if isinstance(text, str) else text[0] for name, text in theirs.items()}
    assert theirs == ours
    (scores,) = (tmp_path / "out").glob("*/*_results.json")
    assert "exact_match,none" in json.loads(scores.read_text())["results"]["local_questions"]
    assert all(row["token_counts"][0]["input_tokens"] > 20 for row in rows)


def test_the_simple_model_gives_our_answers_too(checkpoint, asked):
    pytest.importorskip("lmms_eval")
    from lmms_eval.api.instance import Instance

    from mllm.eval.harnesses.lmms_eval_model import MllmSimple

    folder, ours = asked
    model = MllmSimple(str(checkpoint), device="cpu", batch_size="4")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    model.task_dict = {"t": {"train": rows}}
    requests = [
        Instance(
            "generate_until",
            (row["question"], {"max_new_tokens": 16}, lambda doc: [str(folder / doc["image"])], number, "t", "train"),
            0,
            metadata={"task": "t", "doc_id": number, "repeats": 1},
        )
        for number, row in enumerate(rows)
    ]
    results = model.generate_until(requests)
    assert {row["id"]: result.text for row, result in zip(rows, results)} == ours
    assert all(result.token_counts.output_tokens > 0 for result in results)
    broken = Instance(
        "generate_until", ("?", {}, lambda doc: ["nowhere.png"], 0, "t", "train"), 0, metadata=requests[0].metadata
    )
    with pytest.raises(DataError, match=r"nowhere\.png"):
        model.generate_until([broken])


def test_lmms_eval_settings_become_ours(caplog):
    pytest.importorskip("lmms_eval")
    from mllm.eval.harnesses.lmms_eval_model import options

    assert options({"temperature": 0, "until": ["\n\n"], "top_p": 1.0}) == {"max_new_tokens": 1024, "do_sample": False}
    sampled = options({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "num_beams": 1, "until": "Q:"})
    assert sampled == {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "stop": ["Q:"]}
    assert options({"do_sample": False, "temperature": 0.5})["do_sample"] is False
    options({"image_aspect_ratio": "pad"})
    assert "image_aspect_ratio='pad' is not used by mllm" in caplog.text


def test_lmms_eval_likelihoods_are_those_of_the_model(checkpoint):
    """Against one forward pass over the whole prompt, token by token."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.api.instance import Instance

    from mllm.eval.harnesses.lmms_eval_model import MllmChat, MllmSimple

    model = MllmSimple(str(checkpoint), device="cpu")
    model.task_dict = {"t": {"test": [{"image": picture(0)}, {"image": picture(1)}]}}
    meta = {"metadata": {"task": "t", "doc_id": 0, "repeats": 1}}
    arguments = [("what?", f" {word}", lambda doc: [doc["image"]], number, "t", "test")
                 for number in (0, 1) for word in ("cat", "a dog", "")]  # fmt: skip
    found = model.loglikelihood([Instance("loglikelihood", a, 0, **meta) for a in arguments])
    generator, tokenizer = model.generator, model.tokenizer
    for (_, word, _, number, _, _), (value, greedy) in zip(arguments, found):
        request = Request("r", [Turn("user", f"{IMAGE_MARK}\nwhat?")], [picture(number)])
        inputs = generator._encode([request], [generator.render(request)])
        total, chosen = 0.0, True
        for token in tokenizer(word, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                scores = torch.log_softmax(generator.model(**inputs).logits[0, -1], -1)
            total, chosen = total + float(scores[token]), chosen and int(scores.argmax()) == token
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert value == pytest.approx(total, abs=1e-4) and greedy == chosen
    assert found[0] != found[3], "the picture moves the likelihood"
    with pytest.raises(ConfigError, match="--model_args colour: not known"):
        MllmSimple(str(checkpoint), colour="red")
    with pytest.raises(ConfigError, match="--batch_size auto"):
        MllmSimple(str(checkpoint), batch_size="auto")
    chat = MllmChat(str(checkpoint), device="cpu")
    with pytest.raises(UnavailableError, match="--force_simple"):
        chat.loglikelihood([])


def test_lmms_eval_rounds_go_on_until_the_task_ends_them(checkpoint):
    pytest.importorskip("lmms_eval")
    from lmms_eval.api.instance import Instance

    from mllm.eval.harnesses.lmms_eval_model import MllmChat, MllmSimple

    meta = {"metadata": {"task": "t", "doc_id": 0, "repeats": 1}}
    settings = {"max_new_tokens": 4}
    told: list[tuple] = []

    def to_text(doc, previous_output, round_idx, previous_round_info):
        told.append((list(previous_output), previous_round_info))
        return [doc["image"]], f"round {round_idx}", round_idx == 3, previous_output, round_idx

    def to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        def user(text):
            content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": text}]
            return [{"role": "user", "content": content}]

        if round_idx is None:
            return user("round 0")
        ended = round_idx == 3
        return None if ended else user(f"round {round_idx}"), ended, previous_output, round_idx

    answers = []
    for kind in (MllmSimple, MllmChat):
        model = kind(str(checkpoint), device="cpu")
        model.task_dict = {"t": {"test": [{"image": picture(0)}]}}
        simple = ("round 0", settings, lambda doc: [doc["image"]], to_text, 0, "t", "test")
        chat = ("round 0", to_messages, settings, 0, "t", "test")
        instance = Instance("generate_until_multi_round", simple if kind is MllmSimple else chat, 0, **meta)
        answers += model.generate_until_multi_round([instance])
    assert answers[0] == answers[1] and len(answers[0]) == 3
    assert [len(outputs) for outputs, _ in told] == [1, 2, 3] and [state for _, state in told] == [None, 1, 2]
