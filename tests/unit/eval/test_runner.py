"""Does a run lose nothing, double nothing, and say what was wrong with its input?"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.cache import AnswerCache
from mllm.eval.data.loading import load_data
from mllm.eval.data.sources import whereabouts
from mllm.eval.predictions import header_path, merge_shards, prediction_path, read_predictions
from mllm.eval.report.show import compare, console_lines, markdown, print_results, write_report
from mllm.eval.run import evaluate, report_again, rescore, run_eval
from mllm.eval.settings import EvalSettings
from mllm.eval.studies.batch_check import check_batch
from mllm.eval.task import expand_tasks, load_task
from tests.unit.eval.rules import RuleGenerator, constant, pixel_rule

TASK = "demo_charts"


def make_data(folder: Path, count: int = 12, extra: list[dict] | None = None) -> Path:
    """Questions with one picture for every two of them; answers 0 to 9."""
    folder.mkdir(parents=True)
    rows = []
    for k in range(count):
        Image.new("RGB", (16, 12), (k // 2 * 9 % 256, 3, 7)).save(folder / f"{k // 2}.png")
        rows.append(
            {
                "id": f"q{k}",
                "image": f"{k // 2}.png",
                "question": f"How many {k}?",
                "answer": str(k % 10),
                "kind": "ab"[k % 2],
            }
        )
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, *(extra or [])]) + "\n")
    return folder


def run(folder: Path, output: Path, rule=pixel_rule, name: str = "rule", **options):
    generator = RuleGenerator(rule, name)
    results = evaluate(generator, [TASK], output, data={TASK: folder}, progress=False, **options)
    return results.get(TASK), generator


def test_a_line_holds_prompt_hash_output_extraction_scores_and_rules(tmp_path):
    folder = make_data(tmp_path / "d")
    result, _ = run(folder, tmp_path / "o", constant(" 3. "))
    row = read_predictions(tmp_path / "o/demo_charts.jsonl")[3]
    assert row["id"] == "q3" and row["question"] == "How many 3?" and row["prompt"].endswith("How many 3?")
    assert (
        len(row["images"]) == 1 and len(row["images"][0]) == 64 and row["output"] == " 3. " and row["extracted"] == "3"
    )
    assert row["scores"]["relaxed_strict v2"] == {"value": 1.0, "extracted": "3", "rule": "number within 5%"}
    assert (
        row["scores"]["relaxed_pix2struct v1"]["value"] == 1.0 and row["cluster"] == "1.png" and row["category"] == "b"
    )
    assert result.metrics[0].value == pytest.approx(100 / 12) and result.metrics[0].num_clusters == 6
    assert result.protocol.startswith("demo_charts v1 · relaxed_strict v2 · prompt ")
    assert result.score == pytest.approx(1 / 12)


def test_bad_rows_are_named_and_counted_never_dropped_in_silence(tmp_path):
    good = {"image": "0.png", "question": "?", "answer": "1", "kind": "a"}
    extra = [
        {**good, "id": "q0"},
        {**good, "id": "noimage", "image": "nowhere.png"},
        {**good, "id": "noanswer", "answer": ""},
        {"id": "nofields"},
        {"id": "unanswered", "image": "0.png", "question": "?", "kind": "a"},
        {**good, "id": "broken", "image": "broken.png"},
    ]
    folder = make_data(tmp_path / "d", 4, extra)
    (folder / "broken.png").write_bytes(b"not a picture")
    result, generator = run(folder, tmp_path / "o", constant("1"))
    told = "\n".join(result.problems)
    for words in (
        "duplicate id: q0",
        "missing image: noimage",
        "missing answer: noanswer",
        "unusable row: nofields",
        "broken",
    ):
        assert words in told, words
    assert "'question' is undefined" in told and "the row's fields: id" in told
    assert "1 × unusable row: unanswered (column answers (answer)" in told, "each cause has its own line"
    assert result.metrics[0].num_scored == 4 and result.num_unusable == 5 and result.num_samples == 6
    assert "broken" not in generator.asked and "noanswer" in generator.asked
    rows = {row["id"]: row for row in read_predictions(tmp_path / "o/demo_charts.jsonl")}
    assert rows["noanswer"]["scores"] == {} and "not an image" in rows["broken"]["unusable"]
    with pytest.raises(DataError, match="strict is on"):
        run(folder, tmp_path / "s", strict=True)


def test_a_wrong_file_stops_at_once_with_the_fields_it_has(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/test.jsonl").write_text('{"id": 1, "questoin": "?"}\n')
    with pytest.raises(DataError, match=r"no sample is usable.*did you mean 'questoin'"):
        run(tmp_path / "d", tmp_path / "o")
    with pytest.raises(ConfigError, match="no such file or folder"):
        run(tmp_path / "nowhere", tmp_path / "o")
    (tmp_path / "e").mkdir()
    with pytest.raises(ConfigError, match=r"Looked for demo: test\.jsonl"):
        run(tmp_path / "e", tmp_path / "o")


def test_data_is_found_by_environment_and_its_absence_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnavailableError, match=r"--data demo_charts=/folder.*MLLM_DATA/demo_charts"):
        load_data(load_task(TASK))
    make_data(tmp_path / "root/demo_charts")
    monkeypatch.setenv("MLLM_DATA", str(tmp_path / "root"))
    assert len(load_data(load_task(TASK)).items) == 12
    assert len(load_data(load_task(TASK), data={TASK: tmp_path / "root/demo_charts/test.jsonl"}).items) == 12


def test_a_failed_generation_is_wrong_is_counted_and_is_asked_again_on_resume(tmp_path):
    folder = make_data(tmp_path / "d", 6)
    broken = {"q2", "q4"}

    def rule(request):
        if request.id in broken:
            raise ValueError("too long")
        return request.id[1:]

    result, _ = run(folder, tmp_path / "o", rule)
    assert (
        result.num_errors == 2
        and result.metrics[0].value == pytest.approx(400 / 6)
        and "too long" in result.problems[-1]
    )
    broken.clear()
    result, generator = run(folder, tmp_path / "o", rule)
    assert sorted(generator.asked) == ["q2", "q4"] and result.metrics[0].value == 100.0 and result.num_errors == 0


def test_a_run_whose_first_answers_all_fail_stops(tmp_path):
    folder = make_data(tmp_path / "d")

    def rule(request):
        raise ValueError("no weights")

    with pytest.raises(DataError, match="the first 8 generations all failed, the last with: no weights"):
        run(folder, tmp_path / "o", rule)


def test_resume_keeps_answers_drops_a_torn_line_and_asks_only_the_rest(tmp_path):
    folder = make_data(tmp_path / "d")
    whole, _ = run(folder, tmp_path / "o")
    path = tmp_path / "o/demo_charts.jsonl"
    expected = path.read_text()
    lines = expected.splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:30])
    again, generator = run(folder, tmp_path / "o")
    assert generator.asked == [f"q{k}" for k in range(5, 12)]
    assert path.read_text() == expected and again.metrics[0].value == whole.metrics[0].value


def test_answers_to_pictures_that_were_replaced_are_asked_again(tmp_path):
    folder = make_data(tmp_path / "d")
    run(folder, tmp_path / "o")
    before = {row["id"]: row["images"] for row in read_predictions(tmp_path / "o/demo_charts.jsonl")}
    Image.new("RGB", (16, 12), (200, 100, 50)).save(folder / "2.png")  # shown by q4 and q5
    _, generator = run(folder, tmp_path / "o")
    after = {row["id"]: row["images"] for row in read_predictions(tmp_path / "o/demo_charts.jsonl")}
    assert generator.asked == ["q4", "q5"] and {name for name in after if after[name] != before[name]} == {"q4", "q5"}


def test_a_damaged_or_doubled_line_is_refused(tmp_path):
    folder = make_data(tmp_path / "d")
    run(folder, tmp_path / "o")
    path = tmp_path / "o/demo_charts.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "garbage\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"demo_charts\.jsonl:2: damaged line"):
        run(folder, tmp_path / "o")
    path.write_text("".join([*lines, lines[0]]))
    with pytest.raises(DataError, match="'q0' occurs twice"):
        run(folder, tmp_path / "o")


@pytest.mark.parametrize("change", ["model", "generation", "data"])
def test_answers_of_another_run_are_never_mixed_in(tmp_path, change):
    folder = make_data(tmp_path / "d")
    run(folder, tmp_path / "o")
    if change == "data":
        text = (folder / "test.jsonl").read_text()
        (folder / "test.jsonl").write_text(text.replace("How many 3?", "How few 3?"))
    task = load_task(TASK, ["generation.max_new_tokens=99"] if change == "generation" else [])
    generator = RuleGenerator(pixel_rule, "other" if change == "model" else "rule")
    with pytest.raises(ConfigError, match=f"another run.*{change}: .* there, .* now"):
        evaluate(generator, [task], tmp_path / "o", data={TASK: folder}, progress=False)
    evaluate(generator, [task], tmp_path / "o", data={TASK: folder}, progress=False, resume=False)


def slow_run(folder: Path, output: Path) -> None:
    def rule(request):
        time.sleep(0.003)
        return pixel_rule(request)

    run(folder, output, rule)


def test_kill_minus_nine_at_random_points_loses_and_doubles_nothing(tmp_path):
    folder = make_data(tmp_path / "d", 200)
    run(folder, tmp_path / "whole")
    path = tmp_path / "o/demo_charts.jsonl"
    generator, kept = random.Random(5), 0
    for kill in range(8):
        process = multiprocessing.get_context("fork").Process(target=slow_run, args=(folder, tmp_path / "o"))
        process.start()
        until = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < until and not (path.exists() and path.stat().st_size > kept):
            time.sleep(0.0005)
        time.sleep(generator.uniform(0.0, 0.04))
        process.kill()  # SIGKILL
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
        before, kept = kept, path.stat().st_size
        assert kept >= before, "answers that stood before were lost"
        if kill == 3:  # a line cut in the middle, as a crash of the machine would leave
            path.write_bytes(path.read_bytes() + b'{"id": "q199", "torn')
            kept = path.stat().st_size
    answered = path.read_bytes().count(b"\n")
    assert 8 <= answered < 200
    _, rest = run(folder, tmp_path / "o")
    assert len(rest.asked) == 200 - answered and path.read_text() == (tmp_path / "whole/demo_charts.jsonl").read_text()


def test_limit_keeps_whole_groups_spread_and_ids_select(tmp_path):
    folder = make_data(tmp_path / "d")
    result, generator = run(folder, tmp_path / "o", limit=3)
    assert generator.asked == ["q2", "q6", "q10"] and result.header["limited"]
    more, generator = run(folder, tmp_path / "o", limit=12)
    assert len(generator.asked) == 9 and more.num_samples == 12, "a larger limit adds to a smaller one"
    _, generator = run(folder, tmp_path / "i", ids=["q7", "q1"])
    assert sorted(generator.asked) == ["q1", "q7"]
    with pytest.raises(ConfigError, match="no sample with id zz"):
        run(folder, tmp_path / "j", ids=["zz"])


def test_cache_answers_the_same_question_of_the_same_model_only(tmp_path):
    folder = make_data(tmp_path / "d")
    cache = AnswerCache(tmp_path / "cache/answers.sqlite")
    first, _ = run(folder, tmp_path / "a", cache=cache)
    second, generator = run(folder, tmp_path / "b", cache=cache)
    assert generator.asked == [] and cache.hits == 12 and second.metrics[0].value == first.metrics[0].value
    Image.new("RGB", (16, 12), (250, 0, 0)).save(folder / "0.png")
    _, generator = run(folder, tmp_path / "c", cache=cache)
    assert generator.asked == ["q0", "q1"], "other pixels are another question"
    _, generator = run(folder, tmp_path / "e", name="another model", cache=cache)
    assert len(generator.asked) == 12
    sampled = load_task(TASK, ["generation.do_sample=true"])
    generator = RuleGenerator(pixel_rule)
    for output in ("f", "g"):
        evaluate(generator, [sampled], tmp_path / output, data={TASK: folder}, progress=False, cache=cache)
    assert len(generator.asked) == 24, "sampled answers are not cached"


def test_shards_cover_the_benchmark_and_gaps_are_refused(tmp_path):
    folder = make_data(tmp_path / "d", 11)
    run(folder, tmp_path / "whole")
    (tmp_path / "o/.queue").mkdir(parents=True)
    (tmp_path / "o/.queue/demo_charts.0000000.cell").symlink_to("0")  # what process 0 is at
    for rank in (2, 1):
        assert run(folder, tmp_path / "o", rank=rank, world=3)[0] is None
    result, generator = run(folder, tmp_path / "o", rank=0, world=3)
    assert generator.asked == [f"q{k}" for k in range(8)] and result.num_samples == 11
    assert (tmp_path / "o/demo_charts.jsonl").read_text() == (tmp_path / "whole/demo_charts.jsonl").read_text()
    (tmp_path / "o/demo_charts.jsonl").unlink()
    ids = [f"q{k}" for k in range(11)]
    shard = prediction_path(tmp_path / "o", TASK, None, 2, 3)
    lines = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match=r"1 missing \(q8\)"):
        merge_shards(tmp_path / "o", TASK, ids, 3)
    shard.write_text(
        "".join([*lines, prediction_path(tmp_path / "o", TASK, None, 0, 3).read_text().splitlines(keepends=True)[0]])
    )
    with pytest.raises(DataError, match="'q0' is in more than one shard"):
        merge_shards(tmp_path / "o", TASK, ids, 3)
    shard.write_text("".join(lines))
    with pytest.raises(DataError, match=r"1 unknown \(q10\)"):
        merge_shards(tmp_path / "o", TASK, ids[:-1], 3)
    shard.unlink()
    with pytest.raises(DataError, match="1 of 3 shards are missing"):
        merge_shards(tmp_path / "o", TASK, ids, 3)


def test_blind_shows_gray_of_the_same_size_or_nothing_under_the_same_words(tmp_path):
    folder = make_data(tmp_path / "d")
    seen = []

    def rule(request):
        seen.append(
            (
                request.turns[-1].content,
                [image.getpixel((0, 0)) for image in request.images],
                [i.size for i in request.images],
            )
        )
        return "1"

    result, _ = run(folder, tmp_path / "o", rule, blind=True)
    assert seen[0][0] == seen[12][0] and seen[0][1] != [(127, 127, 127)] == seen[12][1] and seen[0][2] == seen[12][2]
    assert result.blind_score == result.score and (tmp_path / "o/demo_charts.blind-gray.jsonl").exists()
    result, _ = run(folder, tmp_path / "n", rule, blind="none")
    assert seen[-13][0] == "How many 11?" and seen[-13][1] == [] and seen[-1][1] != []  # the shuffled run comes last
    with pytest.raises(DataError, match="blind=True"):
        _ = run(folder, tmp_path / "p")[0].blind_score


def test_a_blind_run_also_shuffles_pictures_and_counts_the_commonest_answer(tmp_path, capsys):
    folder = make_data(tmp_path / "d")
    pictures = {}

    def rule(request):
        pictures.setdefault(request.id, []).append(request.images[0].getpixel((0, 0)))
        return "3"

    result, _ = run(folder, tmp_path / "o", rule, blind=True)
    for right, gray, other in pictures.values():
        assert (
            right != other and gray == (127, 127, 127) != other
        )  # q0 and q1 share a picture: neither gets the other's
    assert sorted(own for own, _, _ in pictures.values()) == sorted(other for *_, other in pictures.values())
    assert result.shuffled.num_samples == 12 and result.shuffled.score == result.blind.score == pytest.approx(1 / 12)
    # no training split: kinds a and b hold 0 2 4 6 8 0 and 1 3 5 7 9 1, so "0" and "1" are right twice each
    assert result.prior.score == pytest.approx(4 / 12) and "benchmark itself" in result.prior.header["counted_in"]
    assert result.floor == (pytest.approx(4 / 12), "prior")
    train = [{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"How many {k}?"}]},
                           {"role": "assistant", "content": "7"}]} for k in range(9)]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    result, _ = run(folder, tmp_path / "t", rule, blind=True)
    assert result.prior.score == pytest.approx(1 / 12) and "train.jsonl" in result.prior.header["counted_in"]
    write_report({TASK: result}, tmp_path / "t")
    said = "8.33 % against 8.33 without the right picture (blank, the highest of blank 8.33, shuffled 8.33, prior 8.33)"
    assert said in markdown({TASK: result}) and said in (tmp_path / "t/report.html").read_text()
    assert "highest of blank 8.33" in " ".join(capsys.readouterr().out.split())
    again = report_again(tmp_path / "t", show=False)[TASK]
    assert again.floor == result.floor and again.shuffled.score == result.shuffled.score
    assert list(report_again(tmp_path / "o", show=False)) == [TASK]


def test_rescore_needs_no_model_and_agrees_with_the_run(tmp_path):
    folder = make_data(tmp_path / "d")
    result, _ = run(folder, tmp_path / "o")
    path = tmp_path / "o/demo_charts.jsonl"
    before = path.read_text()
    again = rescore(path)
    assert path.read_text() == before and again.metrics == result.metrics
    other = rescore(path, ["exact_match", "relaxed_strict"], write=False)
    assert [m.label for m in other.metrics] == ["exact_match v1", "relaxed_strict v2"] and path.read_text() == before
    header_path(path).unlink()
    with pytest.raises(DataError, match="needed to rescore"):
        rescore(path)


def rescore_for_ever(path):
    while True:
        rescore(path, ["exact_match"])
        rescore(path)


def test_kill_minus_nine_while_rescoring_loses_no_answer(tmp_path):
    result, _ = run(make_data(tmp_path / "d", 200), tmp_path / "o")
    path, generator = tmp_path / "o/demo_charts.jsonl", random.Random(3)
    whole = path.read_text()
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=rescore_for_ever, args=(path,))
        process.start()
        time.sleep(generator.uniform(0.02, 0.12))
        process.kill()
        process.join()
        assert [row["id"] for row in read_predictions(path)] == [json.loads(line)["id"] for line in whole.splitlines()]
    again = rescore(path, load_task(TASK).metrics)
    assert path.read_text() == whole and again.metrics == result.metrics


@pytest.mark.parametrize("seed", [5, 6])
def test_a_rescore_killed_anywhere_then_a_run_and_a_rescore_lose_and_double_nothing(tmp_path, seed):
    folder, draw = make_data(tmp_path / "d", 200), random.Random(seed)
    whole, _ = run(folder, tmp_path / "whole")
    text = (tmp_path / "whole/demo_charts.jsonl").read_text()
    names = [f"q{k}" for k in range(200)]
    run(folder, tmp_path / "o", ids=names[:120])  # a run that is not over
    path, stood = tmp_path / "o/demo_charts.jsonl", 0
    for turn in range(4):
        before = len(read_predictions(path))
        process = multiprocessing.get_context("fork").Process(target=rescore_for_ever, args=(path,))
        process.start()
        time.sleep(draw.uniform(0.01, 0.12))
        process.kill()
        process.join()
        if turn % 2:
            rescore(path)
        stood = len(read_predictions(path))
        assert stood == before >= 120
        _, generator = run(folder, tmp_path / "o", ids=names[: 140 + 20 * turn])
        assert len(generator.asked) == len(read_predictions(path)) - stood == 20, "only what was missing is asked"
    again = rescore(path)
    assert sorted(path.read_text().splitlines()) == sorted(text.splitlines())
    assert [m.value for m in again.metrics] == [m.value for m in whole.metrics] and again.num_samples == 200
    assert again.disagreements == whole.disagreements


def test_a_run_after_a_rescore_with_other_metrics_has_every_score_on_every_line(tmp_path):
    folder = make_data(tmp_path / "d", 12)
    whole, _ = run(folder, tmp_path / "whole")
    run(folder, tmp_path / "o", limit=6)
    rescore(tmp_path / "o/demo_charts.jsonl", ["exact_match"])
    result, generator = run(folder, tmp_path / "o")
    assert len(generator.asked) == 6 and [m.num_scored for m in result.metrics] == [12] * len(whole.metrics)
    assert result.metrics == whole.metrics and result.disagreements == whole.disagreements


def test_a_generator_that_loses_or_invents_answers_is_caught(tmp_path):
    folder = make_data(tmp_path / "d")

    class Loses(RuleGenerator):
        def generate(self, requests):
            return (response for response in super().generate(requests) if response.id != "q3")

    class Doubles(RuleGenerator):
        def generate(self, requests):
            for response in super().generate(requests):
                yield from (response, response)

    with pytest.raises(DataError, match="left 1 requests without an answer: q3"):
        evaluate(Loses(pixel_rule), [TASK], tmp_path / "a", data={TASK: folder}, progress=False)
    with pytest.raises(DataError, match="'q0', which was not asked or was answered before"):
        evaluate(Doubles(pixel_rule), [TASK], tmp_path / "b", data={TASK: folder}, progress=False)


def test_check_batch_reports_answers_that_depend_on_the_batch(tmp_path):
    folder = make_data(tmp_path / "d")
    assert check_batch(lambda size: RuleGenerator(pixel_rule), [TASK], data={TASK: folder}) == []
    differing = check_batch(
        lambda size: RuleGenerator(constant(str(size > 2))), [TASK], data={TASK: folder}, batch_sizes=(2, 4)
    )
    assert len(differing) == 12 and differing[0] == {
        "task": TASK,
        "id": "q0",
        "batch_size": 4,
        "alone": "False",
        "batched": "True",
    }


def test_report_has_table_markdown_and_one_page_with_pictures_and_filters(tmp_path, capsys):
    folder = make_data(
        tmp_path / "d", 6, [{"id": "x", "image": "0.png", "question": "<b>bold?</b>", "answer": "2010", "kind": "a"}]
    )
    result, _ = run(folder, tmp_path / "o", lambda r: "2008" if r.id == "x" else r.id[1:], blind=True)
    paths = write_report({TASK: result}, tmp_path / "o")
    shown = capsys.readouterr().out
    assert "relaxed_strict" in shown and "disagree on 1 samples" in shown
    page = paths["report.html"].read_text()
    assert "overflow-wrap:anywhere" in page and "prefers-color-scheme:dark" in page, (
        "readable on a telephone and at night"
    )
    assert page.count("data:image/jpeg;base64,") == 7 and "<b>bold?</b>" not in page and "&lt;b&gt;bold?" in page
    assert (
        "wrong (1)" in page
        and "metrics disagree (1)" in page
        and 'data-f="wrong disagree d0 d1"' in page
        and """onclick="f('demo-charts','d0')">relaxed_strict v2 and relaxed_pix2struct v1 disagree on 1 samples"""
        in page
        and 'src="http' not in page
    )
    text = markdown({TASK: result})
    assert (
        "| demo_charts | relaxed_strict v2 | 85.71 % |" in text
        and "relaxed_strict v2 and relaxed_pix2struct v1 disagree on 1" in text
    )
    stored = json.loads(paths["results.json"].read_text())
    assert stored["tasks"][TASK]["score"] == pytest.approx(6 / 7) and stored["tasks"][TASK]["blind"]["num_samples"] == 7


def test_the_console_table_never_breaks_a_name_and_fits_a_terminal_of_eighty(tmp_path, capsys, monkeypatch):
    row = ("demo_charts", "relaxed_pix2struct", "85.71 %", "10.20", "65.0 – 93.4", "0.00", "1000", "12", "500")
    rows = [row, ("", "mmmu(random_fallback=42)", "5.00 %", "1.00", "1.0 – 9.4", "–", "10", "0", "–")]
    wide, nested, stacked = (console_lines(rows, width) for width in (120, 95, 80))
    assert wide[1].startswith("demo_charts  relaxed_pix2struct        85.71 %  10.20")
    assert nested[1:3] == ["demo_charts", nested[2]] and nested[2].startswith("  relaxed_pix2struct        85.71 %")
    assert stacked[1:3] == ["demo_charts", "  relaxed_pix2struct"] and stacked[3].endswith("1000        12       500")
    for lines, width in ((wide, 120), (nested, 95), (stacked, 80)):
        assert max(map(len, lines)) <= width and all(
            any(name in line for line in lines) for name in (row[1], rows[1][1])
        )
    without = console_lines([(*row[:5], "–", *row[6:8], "–") for row in rows], 80)
    assert (
        "blind" not in without[0] and "clusters" not in without[0] and without[2].startswith("  relaxed_pix2struct  ")
    )
    result, _ = run(make_data(tmp_path / "d", 6), tmp_path / "o")
    monkeypatch.setenv("COLUMNS", "80")
    print_results({TASK: result})
    shown = capsys.readouterr().out.splitlines()
    assert "relaxed_pix2struct" in "".join(shown) and max(map(len, shown)) <= 80


def test_data_that_is_not_there_is_told_for_every_task_before_a_model_is_loaded(tmp_path, monkeypatch):
    import datasets

    def refuse(hub, config, **kwargs):
        if hub == "lmms-lab/POPE":
            return object()  # this one can be had
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnavailableError) as caught:
        run_eval(
            "nowhere", ["quick", "mvbench"], EvalSettings(data_dirs={"cv_bench": "empty"}, output_dir=tmp_path / "o")
        )
    told = str(caught.value)
    assert told.startswith("the data of 4 of 5 tasks is not there\n- chartqa: ") and "pope" not in told
    for words in (
        "lmms-lab/ChartQA could not be loaded (no network)",
        "--data chartqa=/folder",
        "$MLLM_DATA/chartqa",
        "official: test/test_human.json, test/test_augmented.json",
        "hf download lmms-lab/ChartQA --repo-type dataset --local-dir /folder",
        "tsv: MMStar*.tsv",
        "cv_bench: empty holds none of its file layouts. Looked for official: test_2d.jsonl, test_3d.jsonl",
        "hf download OpenGVLab/MVBench --repo-type dataset --revision video --local-dir /folder",
    ):
        assert words in told, words
    with pytest.raises(UnavailableError, match=r"^mmstar: Lin-Chen/MMStar could not be loaded"):
        run_eval("nowhere", ["mmstar"], EvalSettings(output_dir=tmp_path / "o"))


@pytest.mark.parametrize("suite", ["charts", "vqa", "documents", "spatial", "quick"])
def test_every_task_of_a_suite_loads_with_its_metrics_and_says_what_files_it_wants(suite):
    names = expand_tasks([suite])
    assert len(names) >= 4
    for name in names:
        spec = load_task(name)
        assert spec.build_metrics() and f"--data {name}=/folder" in whereabouts(spec)


def test_compare_is_paired_and_refuses_unmatched_sets(tmp_path):
    folder = make_data(tmp_path / "d", 40)
    run(folder, tmp_path / "a", lambda r: str(int(r.id[1:]) % 10) if int(r.id[1:]) % 2 else "x", name="A")
    run(folder, tmp_path / "b", lambda r: str(int(r.id[1:]) % 10), name="B")
    found = compare(tmp_path / "a", tmp_path / "b", show=False)
    assert len(found) == 1 and found[0].comparison.difference == pytest.approx(50.0) and found[0].comparison.wins == 20
    assert found[0].adjusted == found[0].comparison.p_value < 0.01 and found[0].value_a == 50.0
    single = compare(tmp_path / "a/demo_charts.jsonl", tmp_path / "b/demo_charts.jsonl", show=False, seed=0)
    assert single == found
    run(folder, tmp_path / "c", ids=["q1", "q2"], name="C")
    with pytest.raises(DataError, match="38 only in A"):
        compare(tmp_path / "a", tmp_path / "c", show=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no finished prediction file"):
        compare(tmp_path / "a", tmp_path / "empty", show=False)
    other = make_data(tmp_path / "d2", 40)
    (other / "test.jsonl").write_text((other / "test.jsonl").read_text().replace('"answer": "3"', '"answer": "4"'))
    run(other, tmp_path / "e", name="E")
    with pytest.raises(DataError, match="4 samples have different targets"):
        compare(tmp_path / "a", tmp_path / "e", show=False)


def test_compare_of_a_composite_score_bootstraps_whole_groups(tmp_path):
    folder = tmp_path / "mme/existence"
    folder.mkdir(parents=True)
    for k in range(12):
        Image.new("RGB", (8, 8)).save(folder / f"{k}.jpg")
        (folder / f"{k}.txt").write_text(
            "Is there a dog? Please answer yes or no.\tYes\nA cat? Please answer yes or no.\tNo\n"
        )
    for name, rule in (("a", constant("yes")), ("b", lambda r: "yes" if "dog" in r.turns[-1].content else "no")):
        evaluate(RuleGenerator(rule, name), ["mme"], tmp_path / name, data={"mme": tmp_path / "mme"}, progress=False)
    found = compare(tmp_path / "a", tmp_path / "b", show=False)[0]
    assert (found.value_a, found.value_b) == (50.0, 200.0) and found.comparison.difference == 150.0
    assert found.comparison.low == found.comparison.high == 150.0 and found.comparison.num_clusters == 12


def test_the_suite_of_all_holds_every_benchmark_also_ones_own_and_no_demo(tmp_path, monkeypatch):
    spec = "version: 1\ndescription: d\nsources: [{name: s, format: jsonl, files: [t.jsonl], columns: {id: id, question: q, images: i}}]\n"
    (tmp_path / "eval/tasks").mkdir(parents=True)
    (tmp_path / "eval/tasks/mine.yaml").write_text(spec + 'prompt: "{{ question }}"\nmetrics: [exact_match]\n')
    monkeypatch.setenv("MLLM_PATH", str(tmp_path))
    names = expand_tasks(["all"])
    assert {"mine", "mmvp", "chartqa", "wildvision"} <= set(names) and not {"demo_charts", "video_demo"} & set(names)
    assert len(names) == len(set(names)) >= 70


def test_suites_expand_once_and_in_order():
    assert expand_tasks(["demo", "demo_digits", "chartqa"]) == ["demo_charts", "demo_digits", "chartqa"]
