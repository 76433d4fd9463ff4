"""Do a served model's heads say of a text that an engine wrote what the model itself says of it?"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mllm.config import to_plain
from mllm.data.collate import collate
from mllm.heads.segmentation.answer import phrases_of
from mllm.processing.chat import encode_sample
from mllm.processing.mask_files import decode_rle, encode_rle
from mllm.serve.head_parity import OWN, answered, compare_heads, head_cases, model_heads
from mllm.serve.heads import KEY, READER, ServedHeads, served_heads
from mllm.serve.http.admission import Admission, AdmissionSettings
from mllm.serve.http.errors import Refused
from mllm.serve.http.fields import CHAT
from mllm.serve.http.heads_beside import HeadFields, asked_of_heads, last_question, name_request
from mllm.serve.server import ServeSettings, plan
from mllm.serve.traces import Case
from mllm.types import IMAGE_MARK, Sample, Turn
from tests.helpers import picture, tiny_model
from tests.unit.heads.test_segmentation import HEAD, MASK, OTHER

SURE = {"type": "probability", "phrase": "This image is", "words": ["real", "fake"], "calibration": 2.0}
QUESTION = "Please segment the cup."
ANSWERS = (
    "It is [SEG]. This image is fake",
    "First [SEG], then [SEG]. This image is real",
    "Nothing. This image is real",
)
MASKS = ([MASK], [OTHER, MASK], [])


SHOWN = {"queries": 2, "heads": 2, "mlp_width": 8}
HEADS = {"marks": {**HEAD, "states": 3, "examples": SHOWN, "threshold": 0.7}, "sure": SURE}
"""[SEG] may stand where an answer has fewer states before it, and a question may show another picture with its mask."""
SAME = "Please segment the same."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """What `train_by_heart` gives."""
    return train_by_heart(tmp_path_factory.mktemp("trained"))


def train_by_heart(folder: Path) -> tuple[Any, Any, Path]:
    """A model that knows the verdicts and masks of three pictures by heart, its processor and where that is saved."""
    model, processor = tiny_model(folder / "t", heads=HEADS)
    samples = [
        Sample(
            f"s{k}", [Turn("user", f"{IMAGE_MARK}\n{QUESTION}"), Turn("assistant", answer)], [picture(k)], masks=masks
        )
        for k, (answer, masks) in enumerate(zip(ANSWERS, MASKS))
    ]
    turns = [Turn("user", f"{IMAGE_MARK} [EX]\n{IMAGE_MARK}\n{SAME}"), Turn("assistant", "It is [SEG].")]
    samples.append(Sample("shown", turns, [picture(1), picture(0)], masks=[OTHER, MASK]))
    inputs = collate([encode_sample(processor, sample) for sample in samples], pad_token_id=0).inputs
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(70):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    processor.save_pretrained(folder)
    return model.eval(), processor, folder


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


class Engine:
    """Steps of an engine that writes given answers: vLLM's calls of model and logits processor, in its order."""

    def __init__(self, model: Any, processor: Any, folder: Path):
        from mllm.serve.vllm.head_reader import HeadReader
        from mllm.serve.vllm.served_heads import HeadsInEngine

        self.model, self.processor = model, processor
        self.shown: Any = None  # a picture before the one that is asked about
        self.heads = HeadsInEngine(model.config, model.config.encoder_infos())
        self.heads.modules.load_state_dict(model.heads.state_dict())
        self.heads.modules.eval()
        self.reader = HeadReader(None, torch.device("cpu"), False)
        served = SimpleNamespace(vision_tower=model.model.vision_tower, pixel_keys=model.model.pixel_keys)
        self.ask = lambda request: self.heads.answer(served, str(folder), request)

    def states(self, number: int) -> tuple[torch.Tensor, list[int]]:
        """Last hidden states ``(T, L)`` from the one that chooses the answer's first id on, and the answer's ids."""
        from mllm.heads.answers import answer

        question, before = (QUESTION, None) if self.shown is None else (SAME, [(self.shown, "[EX]")])
        options = {"max_new_tokens": 48}
        found = answer(self.model, self.processor, [picture(number)], [question], options, before=before)
        ids = [i for i in found.answers[0].tolist() if i != 0]
        return found.hidden[0, found.start - 1 :], ids

    def write(self, numbers: list[int]) -> dict[int, str]:
        """Write the answers about these pictures together; rows change their places as answers end. Returns their names."""
        from vllm.v1.sample.logits_processor import MoveDirectionality

        params = lambda key: SimpleNamespace(extra_args={KEY: key})  # noqa: E731
        runs = [(number, f"key-{number}", *self.states(number), []) for number in numbers]
        added = [(row, params(key), [], output) for row, (_, key, _, _, output) in enumerate(runs)]
        update: Any = SimpleNamespace(added=added, removed=[], moved=[])
        while runs:
            self.reader.update_state(update)
            hidden = torch.stack([states[len(output)] for _, _, states, _, output in runs])
            logits = self.model.compute_logits(hidden)
            self.heads.see(hidden, logits)
            logits.fill_(0.0)  # what a client's bias does must not matter
            self.reader.apply(logits)
            for _, _, _, ids, output in runs:
                output.append(ids[len(output)])
            removed = [row for row, (_, _, _, ids, output) in enumerate(runs) if len(output) == len(ids)]
            moved = []
            for row in removed:  # as vLLM fills gaps: the last request that goes on takes the place
                while runs and len(runs[-1][4]) == len(runs[-1][3]):
                    runs.pop()
                if row < len(runs):
                    moved.append((len(runs) - 1, row, MoveDirectionality.UNIDIRECTIONAL))
                    runs[row] = runs.pop()
            update = SimpleNamespace(added=[], removed=removed, moved=moved) if removed else None
        return {number: f"key-{number}" for number in numbers}


def test_parity_compares_masks_and_probabilities_and_says_what_nothing_tested(trained: Any, tmp_path: Path) -> None:
    model, processor, _ = trained
    turns = [Turn("user", f"{IMAGE_MARK}{IMAGE_MARK}\n{QUESTION}")]
    asked = head_cases(model, processor, [Case(OWN, turns, [picture(0), picture(1)])])
    assert len(asked) == 4 and asked[0].turns[0].content == f"{IMAGE_MARK}\n{QUESTION}"
    known = model_heads(model, processor, asked)
    assert known[0].masks and known[0].probability and all(answered(model, known).values())
    same = compare_heads(asked, known, model_heads(model, processor, asked, together=True), path="together")
    assert all(one.same for one in same), [one.notes for one in same]
    changed = dict(known[0].masks[0] or {})
    mask = decode_rle(changed["rle"])
    mask[3, 4] ^= 1
    shares = {"real": known[0].probability["real"] + 2e-4, "fake": known[0].probability["fake"] - 2e-4}
    others = [
        replace(known[0], masks=[{**changed, "rle": encode_rle(mask)}]),
        replace(known[0], masks=[]),
        replace(known[0], masks=[None]),
        replace(known[0], probability=shares),
        replace(known[0], probability=None),
        replace(known[0], text="It is."),
    ]
    told = [compare_heads(asked[:1], known[:1], [other], path="x")[0].notes for other in others]
    wanted = ["mask 0: 1 pixels", "0 masks, and 1", "not known", "by 2.0e-04", "one side alone", "words: 'It is.'"]
    assert all(len(notes) == 1 and part in notes[0] for notes, part in zip(told, wanted)), told
    assert answered(model, [replace(known[0], masks=[], probability=None)]) == {"head marks": 0, "head sure": 0}


@pytest.mark.parametrize("state", ["predict", "self"])
def test_an_engines_states_give_the_masks_and_the_probability_of_the_model_itself(
    trained: Any, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    model, processor, folder = trained
    monkeypatch.setattr(model.heads["marks"].config, "state", state)
    engine = Engine(model, processor, folder)
    monkeypatch.setattr(engine.heads.marks.config, "state", state)
    names = engine.write([1, 0, 2])
    for number, key in names.items():
        marked = model.segment(picture(number), questions=QUESTION, processor=processor, max_new_tokens=48)
        sure = model.probability(picture(number), QUESTION, processor=processor, max_new_tokens=48)
        assert marked.text == ANSWERS[number], "the model has not learned its answers"
        request = {"key": key, "text": marked.text, "question": QUESTION, "picture": png(number)}
        found = engine.ask(request)
        wanted = marked.records(processor.segments, QUESTION)
        assert len(found["masks"]) == len(wanted) == len(MASKS[number])
        for given, expected in zip(found["masks"], wanted):
            one, other = decode_rle(given["rle"]), decode_rle(expected["rle"])
            assert (
                other.any()
                and (one != other).mean() < 0.005
                and given["score"] == pytest.approx(expected["score"], abs=1e-3)
            )
            assert given["phrase"] == expected["phrase"]
        assert found["probability"] == pytest.approx(sure.probabilities, abs=1e-5)
        json.dumps(found)
        assert engine.ask(request) is None, "an answer is asked for once"
    assert max(found["probability"].values()) < 1


def test_an_answer_that_ends_with_its_mask_or_never_names_a_class(trained: Any) -> None:
    pytest.importorskip("vllm")
    model, processor, folder = trained
    engine = Engine(model, processor, folder)
    states, ids = engine.states(0)
    place = ids.index(processor.segments.token_id)
    engine.states = lambda number: (states, ids[: place + 1])  # type: ignore[method-assign]  # cut by max_tokens
    key = engine.write([0, 1])[0]
    engine.reader.update_state(SimpleNamespace(added=[], removed=[0, 1], moved=[]))
    kept = [[len(states) for states, _ in row.recent] for row in engine.heads.answers.values()]
    assert kept == [[1, 1, 1]] * 2, "an ended answer keeps the others' states"
    found = engine.ask({"key": key, "text": "It is [SEG]", "question": "What?", "picture": png(0)})
    whole = model.segment(picture(0), questions=QUESTION, processor=processor, max_new_tokens=48)
    assert found["probability"] is None
    (mask,) = found["masks"]
    assert (decode_rle(mask["rle"]) != whole.masks[0].numpy()).mean() < 0.005 and mask["phrase"] == "It is"


def test_a_picture_with_its_mask_says_what_is_marked_in_another(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    model, processor, folder = trained
    engine = Engine(model, processor, folder)
    engine.shown = picture(1)
    key = engine.write([0])[0]
    wanted = model.segment(picture(0), example=(picture(1), OTHER), processor=processor, max_new_tokens=48)
    assert wanted.text == "It is [SEG]."
    request = {"key": key, "text": wanted.text, "question": SAME, "picture": png(0)}
    predict, seen = engine.heads.marks.predict, []
    monkeypatch.setattr(engine.heads.marks, "predict", lambda *given: seen.append(given) or predict(*given))
    (given,) = engine.ask({**request, "example": {"picture": png(1), "mask": encode_rle(OTHER)}})["masks"]
    assert given == wanted.records(processor.segments, SAME)[0] | {"score": pytest.approx(wanted.scores[0], abs=1e-3)}
    assert given["phrase"] == "the same"
    ((_, _, owners, _, shown),) = seen
    assert torch.equal(shown.masks, processor.segments.lay(OTHER)[None])
    assert shown.owners.tolist() == [0] and owners.tolist() == [1], "which picture is which"


def test_which_heads_are_served_and_with_what(tmp_path: Path) -> None:
    model, processor = tiny_model(tmp_path / "t", heads=HEADS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert served_heads(None) is None and served_heads({}) is None
    assert served_heads(to_plain(model.config.heads)) == ServedHeads(mark="[SEG]", example="[EX]", probability=True)
    arguments, environment = plan(ServeSettings(checkpoint=str(tmp_path)))
    assert READER in arguments and environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    settings = AdmissionSettings.model_validate_json(environment["MLLM_ADMISSION"])
    assert settings.heads == ServedHeads(mark="[SEG]", example="[EX]", probability=True)
    information = Admission(None, settings).information()
    assert information["masks"] and information["probability"]
    arguments, environment = plan(ServeSettings(checkpoint=str(tmp_path), backend="transformers"))
    assert READER not in arguments
    assert AdmissionSettings.model_validate_json(environment["MLLM_ADMISSION"]).heads is None


def test_what_is_asked_for_names_a_mask() -> None:
    spec: Any = SimpleNamespace(token="[SEG]", question="Please segment {phrase}.")
    assert phrases_of(spec, "Please segment the cup.", "It is [SEG].") == ["the cup"]
    assert phrases_of(spec, "What is here?", "A cup [SEG], and a plate [SEG].") == ["A cup", "and a plate"]
    assert phrases_of(spec, "What is here?", "Nothing.") == []
    messages = [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "\nWhich?"}]}]
    assert last_question({"messages": [*messages, {"role": "assistant", "content": "x"}]}) == "Which?"


def through(chunks: list[bytes], kind: bytes, found: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a client gets of an answer in these pieces, and what the heads were asked."""
    sent: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask(request: dict[str, Any]) -> Any:
        asked.append(request)
        if isinstance(found, Exception):
            raise found
        return found

    async def run() -> None:
        heads = HeadFields(send, ServedHeads(mark="[SEG]", probability=True), ask, {"key": "k"})
        headers = [(b"content-type", kind), (b"content-length", b"5")]
        await heads.send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, chunk in enumerate(chunks):
            await heads.send({"type": "http.response.body", "body": chunk, "more_body": number < len(chunks) - 1})

    asyncio.run(run())
    return sent, asked


FOUND = {"masks": [{"phrase": "a"}], "probability": {"real": 0.25, "fake": 0.75}}


def test_a_whole_answer_gets_the_fields_and_its_length() -> None:
    body = json.dumps({"choices": [{"message": {"content": "It is [SEG]."}}]}).encode()
    sent, asked = through([body[:20], body[20:]], b"application/json", FOUND)
    assert asked == [{"key": "k", "text": "It is [SEG]."}]
    answer = json.loads(sent[-1]["body"])
    assert answer["mllm_masks"] == FOUND["masks"] and answer["mllm_probability"] == FOUND["probability"]
    assert answer["choices"][0]["message"]["content"] == "It is [SEG]."
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[-1]["body"])).encode()
    for lost in (None, RuntimeError("the engine is busy")):
        answer = json.loads(through([body], b"application/json", lost)[0][-1]["body"])
        assert answer["mllm_masks"] is None and answer["choices"]


def test_a_stream_gets_them_before_its_end() -> None:
    pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("It is ", "[SEG].")]
    stream = b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces) + b"data: [DONE]\n\n"
    sent, asked = through([stream[:30], stream[30:75], stream[75:]], b"text/event-stream", FOUND)
    events = b"".join(message.get("body", b"") for message in sent).split(b"\n\n")
    assert asked == [{"key": "k", "text": "It is [SEG]."}] and events[-2] == b"data: [DONE]"
    chunk = json.loads(events[-3].removeprefix(b"data: "))
    assert chunk == {"object": "chat.completion.chunk", "choices": [], "mllm_masks": FOUND["masks"],
                     "mllm_probability": FOUND["probability"]}  # fmt: skip


BYTES = base64.b64encode(png(0)).decode()


def chat(*parts: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


def shown(**more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BYTES}"}, **more}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_a_mask_beside_its_picture_is_told_the_model_and_its_heads() -> None:
    heads = ServedHeads(mark="[SEG]", example="[EX]")
    admission = Admission(None, AdmissionSettings(heads=heads))
    mask = encode_rle(MASK)
    asked = chat(shown(mask=mask), shown(), said(f"\n{SAME}"))
    data, pictures = asyncio.run(admission._admit(CHAT, asked, ""))
    texts = [part.get("text") or part["type"] for part in data["messages"][0]["content"]]
    assert texts == ["image_url", " [EX]\n", "image_url", f"\n{SAME}"] and "mask" not in json.dumps(data)
    request = asked_of_heads(data, pictures, heads)
    assert request["example"] == {"picture": png(0), "mask": mask} and request["picture"] == png(0)
    assert request["question"] == SAME


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([shown(), shown(), said(f"[EX]\n{SAME}")], "put the mask beside its picture"),
        ([shown(mask="x.png"), shown(), said(SAME)], "picture 0, mask: expected run lengths"),
        ([shown(mask={"size": [9, 9], "counts": [0, 81]}), shown()], "picture 0, mask: its size is [9, 9]"),
        ([shown(), shown(mask=encode_rle(0 * MASK))], "picture 1, mask: it marks nothing"),
        ([shown(mask={"size": [30, 40], "counts": [0, 7]})], "cover 7 pixels"),
        ([shown(mask={"size": [30, 40], "counts": [2**62, 2**62, 2**62, 2**62, 1200]})], "run lengths"),
        ([shown(mask={"size": [30, 40], "counts": "o" * 10**6})], "more than 64 bits"),
    ],
)
def test_an_example_that_cannot_be_read_is_refused(parts: list[Any], says: str) -> None:
    admission = Admission(None, AdmissionSettings(heads=ServedHeads(mark="[SEG]", example="[EX]")))
    with pytest.raises(Refused, match=re.escape(says)):
        asyncio.run(admission.admit(CHAT, chat(*parts)))


def test_a_model_without_examples_takes_no_mask() -> None:
    admission = Admission(None, AdmissionSettings(heads=ServedHeads(mark="[SEG]")))
    with pytest.raises(Refused, match="not trained to be shown"):
        asyncio.run(admission.admit(CHAT, chat(shown(mask=encode_rle(MASK)), said("What?"))))
    made = asyncio.run(admission.admit(CHAT, chat(shown(), said("[EX] is a word here."))))
    assert made["messages"][0]["content"][1]["text"] == "[EX] is a word here."


def test_a_request_is_named_and_several_answers_are_refused() -> None:
    data: dict[str, Any] = {"n": 1}
    assert data["vllm_xargs"] == {KEY: key} if (key := name_request(data)) else False
    with pytest.raises(Refused, match="one answer a request"):
        name_request({"n": 2})
