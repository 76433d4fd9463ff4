"""Are a judge's verdicts read, kept, counted and compared, and does a judge that goes away leave nothing wrong behind?"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mllm import assets
from mllm.errors import ConfigError, DataError
from mllm.eval.generators.openai import OpenAIGenerator
from mllm.eval.judging.agreement import cohens_kappa, read_hand_verdicts, write_sheet
from mllm.eval.judging.judge import judge_predictions, stored_verdicts
from mllm.eval.judging.prompts import is_refusal, load_judge_prompt, read_verdict
from mllm.eval.judging.run import run_judge
from mllm.eval.predictions import header_path
from mllm.eval.task import load_task


class Judge(ThreadingHTTPServer):
    """A chat server that answers by a rule on the prompt, and refuses everything after ``last`` answers."""

    daemon_threads = True

    def __init__(self, rule):
        super().__init__(("127.0.0.1", 0), Chat)
        self.rule, self.asked, self.last, self.lock = rule, [], None, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Chat(BaseHTTPRequestHandler):
    server: Judge

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        with self.server.lock:
            gone = self.server.last is not None and len(self.server.asked) >= self.server.last
            if not gone:
                self.server.asked.append(text)
        reply = {"model": "judge-2026-01-01", "choices": [{"message": {"content": self.server.rule(text)}}]}
        data = b"overloaded" if gone else json.dumps(reply).encode()
        self.send_response(503 if gone else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    made = []

    def start(rule) -> Judge:
        made.append(Judge(rule))
        return made[-1]

    yield start
    for each in made:
        each.shutdown()
        each.server_close()


def ask(server: Judge, name: str = "judge") -> OpenAIGenerator:
    return OpenAIGenerator(name, server.url, concurrency=1, max_retries=0)


def predictions(folder: Path, outputs: list[str], task: str = "chartx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    spec = load_task(task)
    rows = [
        {"id": f"q{k}", "question": "How much?", "prompt": "", "images": [], "output": output, "target": "5", "meta": {},
         "cluster": None, "category": "bar" if k % 2 else "pie", "scores": {}, "extracted": ""}
        for k, output in enumerate(outputs)
    ]  # fmt: skip
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    identity = {"task": task, "version": 1, "data": "d", "model": "m", "generation": {}, "blind": None}
    header = {"identity": identity, "task": spec.model_dump(mode="json"), "metrics": [], "source": "official"}
    header_path(path).write_text(json.dumps(header))
    return path


def says(text: str) -> str:
    """Right when the answer is 5, prose for 6, a refusal for 7."""
    answer = text.split("Response: ")[1].split("\n")[0]
    return {"5": "Yes", "6": "That depends on how one reads it.", "7": "I'm sorry, I cannot assist with that."}.get(
        answer, "No."
    )


def test_verdicts_are_scored_counted_and_never_paid_for_twice(tmp_path, server):
    judge = server(says)
    path = predictions(tmp_path, ["5", "4", "5", "6", "7"])
    result = judge_predictions(path, ask(judge), load_judge_prompt("chartx"), progress=False)
    sure = result.estimate()
    assert sure.value == pytest.approx(40.0) and sure.num_samples == 5 and 0 < sure.low < 40 < sure.high < 100
    assert result.unread == {"no verdict": 1, "refused": 1} and result.missing == 0
    assert result.by_category() == pytest.approx({"pie": 200 / 3, "bar": 0.0})
    assert "openai:judge = judge-2026-01-01 · chartx v1 (" in result.label
    assert len(judge.asked) == 4, "two answers are the same: one question to the judge"
    again = judge_predictions(path, ask(judge), load_judge_prompt("chartx"), progress=False)
    assert len(judge.asked) == 4 and list(again.verdicts()) == list(result.verdicts())
    (stored,) = stored_verdicts(tmp_path)
    assert stored.estimate() == sure


def test_a_judge_that_goes_away_gives_no_score_and_is_asked_on_later(tmp_path, server):
    judge = server(says)
    judge.last = 3
    path = predictions(tmp_path, [str(k) for k in range(100, 120)])
    result = judge_predictions(path, ask(judge), load_judge_prompt("chartx"), progress=False)
    assert result.missing == 17 and result.estimate().value != result.estimate().value
    assert [each.missing for each in stored_verdicts(tmp_path)] == [17]
    judge.last = None
    whole = judge_predictions(path, ask(judge), load_judge_prompt("chartx"), progress=False)
    assert whole.missing == 0 and len(judge.asked) == 20 and whole.estimate().value == 0.0


@pytest.mark.parametrize(
    ("reads", "reply", "value", "rule"),
    [
        ("chartx", "Yes, they are equivalent.", 1.0, "first word"),
        ("chartx", "**No**", 0.0, "first word"),
        ("chartx", "The two differ, so the answer is incorrect.", 0.0, "only verdict word"),
        ("chartx", "It is not correct.", 0.0, "only verdict word"),
        ("chartx", "It could be right or wrong.", None, "no verdict"),
        ("chartx", "<think>yes yes</think>No", 0.0, "first word"),
        ("chartx", "", None, "empty"),
        ("charxiv_reasoning", 'Here: {"extracted_answer": "5", "score": 1}', 1.0, "score"),
        ("charxiv_reasoning", '{"score": 0.5}', None, "score is neither 0 nor 1"),
        ("hallusionbench", "unclear", 0.0, "first word"),
        ("mmvet", "0.7", 0.7, "grade"),
        ("mmvet", "70", None, "grade outside 0 to 1"),
        ("llava_bench", "8 6\nThe first is better.", 0.75, "two ratings"),
        ("llava_bench", "Both are good.", None, "no verdict"),
        ("wildvision", "My verdict: [[B>>A]]", 1.0, "B>>A"),
        ("mathvista", "Extracted answer: 12", 0.0, "extracted"),
    ],
)
def test_a_reply_is_read_as_its_prompt_says(reads, reply, value, rule):
    verdict = read_verdict(load_judge_prompt(reads), reply)
    assert (verdict.value, verdict.rule) == (value, rule)


def test_preference_is_asked_in_both_orders_and_ratings_are_a_ratio(tmp_path, server):
    judge = server(lambda text: "[[A>B]]")  # always the first: the order decides
    path = predictions(tmp_path / "a", ["9"], "wildvision")
    result = judge_predictions(path, ask(judge), load_judge_prompt("wildvision"), progress=False)
    (verdict,) = result.verdicts()
    assert verdict["value"] == 0.0 and verdict["rule"] == "the order decides" and len(judge.asked) == 2
    rater = server(lambda text: "10 5" if "Assistant 2: a" in text else "5 5")
    path = predictions(tmp_path / "b", ["a", "b"], "llava_bench")
    text = path.read_text().replace('"meta": {}', '"meta": {"caption": "a cat"}')
    path.write_text(text)
    result = judge_predictions(path, ask(rater), load_judge_prompt("llava_bench"), progress=False)
    assert result.estimate().value == pytest.approx(100 * 10 / 15), "(5 + 5) over (10 + 5)"


def test_an_extraction_is_scored_by_the_published_rule(tmp_path, server):
    judge = server(lambda text: "5" if "Reply: about five" in text else "6")
    path = predictions(tmp_path, ["about five", "six"], "mathvista")
    meta = {"question_type": "free_form", "answer_type": "integer", "precision": 0}
    path.write_text(path.read_text().replace('"meta": {}', f'"meta": {json.dumps(meta)}'))
    result = judge_predictions(path, ask(judge), load_judge_prompt("mathvista"), progress=False)
    assert result.estimate().value == 50.0 and {v["extracted"] for v in result.verdicts()} == {"5", "6"}


def test_kappa_by_hand():
    # they differ on 1 of 4; by chance on .5·.75 + .5·.25 = half of them
    assert cohens_kappa([1, 1, 0, 0], [1, 0, 0, 0]) == pytest.approx(0.5)
    assert cohens_kappa([1, 0], [1, 0]) == 1.0 and cohens_kappa([1, 0], [0, 1]) == pytest.approx(-1.0)
    assert cohens_kappa([1, 1], [1, 1]) != cohens_kappa([1, 1], [1, 1]), "nothing to agree on"
    # grades weigh by distance: observed .1/2, expected (.5·.1 + .5·.9)/… over the four pairs of 0 and .9 with 0 and 1
    observed, expected = (0 + 0.1) / 2, (0 + 1 + 0.9 + 0.1) / 4
    assert cohens_kappa([0.0, 0.9], [0.0, 1.0]) == pytest.approx(1 - observed / expected)


def test_two_judges_and_a_person_are_compared(tmp_path, server):
    strict, lax = server(says), server(lambda text: "Yes")
    predictions(tmp_path, ["5", "4", "5", "3"])
    run_judge(tmp_path, "strict", base_url=strict.url, progress=False, concurrency=1)
    study, _ = run_judge(tmp_path, "lax", base_url=lax.url, progress=False, concurrency=1)
    assert study is not None and "hand" in " ".join(study.notes)
    told = []
    run_judge(tmp_path, None, sheet=3, say=told.append)
    sheet = tmp_path / "judges/chartx.hand.csv"
    assert sheet.exists() and "fill in" in told[0] and "Yes" not in sheet.read_text()
    lines = sheet.read_text().splitlines()
    filled = [lines[0]] + [line + ("1" if line.endswith(",5,") else "0") for line in lines[1:]]
    sheet.write_text("\n".join(filled) + "\n")
    with pytest.raises(DataError, match="not written over"):
        run_judge(tmp_path, None, sheet=3)
    study, folder = run_judge(tmp_path, None, hand=sheet)
    table = next(t for t in study.tables if t.caption == "Agreement")
    rows = {(row[1].split(" ")[0], row[2].split(" ")[0]): row for row in table.rows}
    assert rows["openai:strict", "by"][4:6] == ("100.0", "1.00"), "the strict judge says what the person says"
    assert float(rows["openai:lax", "by"][4]) < 100.0
    assert json.loads((folder / "judges.json").read_text())["data"]["agreement"]


def test_hand_verdicts_and_missing_judges_are_named(tmp_path):
    sheet = tmp_path / "hand.csv"
    sheet.write_text("id,verdict\nq1,maybe\n")
    with pytest.raises(DataError, match=r"hand\.csv:2: verdict 'maybe'; expected 1 or 0"):
        read_hand_verdicts(sheet)
    sheet.write_text("id,verdict\nq1,\n")
    with pytest.raises(DataError, match="no verdict is filled in"):
        read_hand_verdicts(sheet)
    predictions(tmp_path, ["5"])
    with pytest.raises(ConfigError, match="name a judge: --judge MODEL"):
        run_judge(tmp_path, None)
    with pytest.raises(ConfigError, match="name one with --prompt"):
        run_judge(tmp_path, "x", tasks=["mmvet"])
    (tmp_path / "none.jsonl").touch()
    assert write_sheet(tmp_path / "none.jsonl", tmp_path / "empty.csv", 5).read_text().startswith("id,question")


def test_every_shipped_prompt_says_its_source_and_asks_about_any_row():
    names = assets.available("eval/judges")
    row = {"id": "1", "question": "How much?", "output": "5", "target": ["5"], "category": None,
           "meta": {"caption": "c", "subplot": "", "plain_question": "", "question_type": "free_form", "answer_type": "text"}}  # fmt: skip
    for name in names:
        prompt = load_judge_prompt(name)
        text = prompt.turns(row)[-1].content
        assert "5" in text and "arXiv" in prompt.source and prompt.name == name
    asked = {load_task(name).judge for name in assets.available("eval/tasks")} - {None}
    assert asked == set(names), "each prompt belongs to a task, each task's prompt exists"
    assert is_refusal("I'm sorry, but I can't help.") and not is_refusal("The sign says sorry.")
