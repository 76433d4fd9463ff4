"""Do our rules give lmms-eval's verdicts, reply by reply, on the tasks that both have?

    pip install -e '.[lmms-eval]'                     # or: uv pip install --target FOLDER --no-deps lmms-eval and what it imports
    python benchmarks/eval_agreement.py [FOLDER]      # the table of eval/README.md; examples of what differs on stderr

FOLDER holds what is not installed (``anls`` and ``munkres`` for ChartQAPro).

Each task is asked hundreds of made-up questions; the replies have the wording of real ones (letters in every dress, hedges,
numbers with units, lists, corrections, refusals, thoughts). Both harnesses score the same reply to the same question. Beside
the headline stands the rule of ours that claims to be theirs.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import functools
import io
import itertools
import random
import sys
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.eval.metrics import Scored, build_metric
from mllm.eval.metrics.text import NUMBER_WORDS

Doc = dict[str, Any]
Rule = tuple[str, Callable[[Doc, str], float], str | Doc, str | Doc | None, str]
"""Kind of rows, their score, our headline, our copy of their rule, why the headline differs."""
Case = tuple[Doc, str, Any, Doc]  # their row, the reply, our target, our meta
OPTIONS = ["a red bus", "two blue cars", "nothing", "a green van"]
LETTERS = "ABCD"
CHOICE = (
    "{L}", "{l}", "({L})", "{L}.", "{L}) {text}", "{L}. {text}", "{text}", "The answer is {L}.", "The answer is ({L}).",
    "The correct answer is {L}. {text}", "Answer: {L}", "**{L}**", "**Answer: {L}**", "\\boxed{{{L}}}", "Option {L}",
    "I think it is {L}, but I am not sure.", "It could be {L} or {M}.", "Not {M}. The answer is {L}.", "{M}? No, wait: {L}.",
    "Based on the image, the best choice is ({L}) {text}.", "A careful look shows {text}, so {L}.", "I cannot tell.",
    "Sorry, I can't help with that request.", "", "The image shows {text}.", "{L} because the others are wrong", "{text}.",
    "Let me think. {M} looked right at first. However, {L} is correct.", "{L}\n\nExplanation: it is {text}.", "None of the above",
    "<think>{M}?</think>{L}", "Final answer: {L}", "The best answer is: {L}", "Answer is {L}:", "{L}, {M}", "Both {L} and {M}",
)  # fmt: skip
YES_NO = (
    "Yes", "No", "yes", "no", "Yes.", "No.", "yes, there is", "No, there is not.", "Yes, the picture shows one.", "There is none.",
    "No, I don't see one.", "not visible", "It is not possible to say.", "", "YES", "NO!", "Yes and no.", "The answer is yes.",
    "The answer is no.", "I cannot see that.", "**Yes**", "There is no dog, but yes, a cat.", "Nope", "Yeah", "Y", "N", "Unclear",
    "I'm sorry, I cannot help.", "Yes\n", "No, it's a cat",
)  # fmt: skip
NUMBER = (
    "{n}", "{n}.", "{n}%", "{n} %", "${n}", "about {n}", "{n} million", "The answer is {n}.", "{n},000", "approximately {n} units",
    "It is {n} in 2010.", "{near}", "{far}", "{words}", "", "I cannot read the value.", "{n}.0", "-{n}", "[{n}, {far}]", "{n} and {far}",
    "{n} m", "between {n} and {far}", "{n} people", "The value is roughly {near}", "{n}\n", "{far} or {n}",
)  # fmt: skip
TEXT = (
    "{a}", "{a}.", "{A}", "the {a}", "{a} ", "It says {a}.", "{b}", "a {a}", "{a}, {b}", "{a} and {b}", "{a}s", "'{a}'", '"{a}"',
    "{half}", "", "I cannot read it.", "{a}\n{b}", "The answer is {a}", "not {a}", "{a}!", "{a}?", "unanswerable", "{a} {a}", "{a}'s",
)  # fmt: skip

BOX = (
    "[{a}, {b}, {c}, {d}]", "[{a},{b},{c},{d}]", "The box is [{a}, {b}, {c}, {d}].", "{a}, {b}, {c}, {d}", "({a}, {b}, {c}, {d})",
    "<box>[{a}, {b}, {c}, {d}]</box>", "[{c}, {d}, {a}, {b}]", "[{a} {b} {c} {d}]", "[{a}, {b}, {c}]", "I cannot see it.", "",
    "[[{a}, {b}, {c}, {d}]]", "bbox: [ {a} , {b} , {c} , {d} ]", "[{a}, {b}, {c}, {d}] and [0.1, 0.1, 0.2, 0.2]",
    "[0.1, 0.1, 0.2, 0.2], no: [{a}, {b}, {c}, {d}]", "It stands at the left.", "```json\n[{a}, {b}, {c}, {d}]\n```",
    '{{"bbox": [{a}, {b}, {c}, {d}]}}', "x1={a}, y1={b}, x2={c}, y2={d}", "[0, 0, 1, 1]", "**[{a}, {b}, {c}, {d}]**", "[{a}, {b}, {c}, 1]",
)  # fmt: skip


def choices(rng: random.Random) -> Iterator[tuple[list[str], int, str]]:
    """(options, right one, reply)."""
    for wording in CHOICE:
        for _ in range(16):
            options = rng.sample(OPTIONS, 4)
            said, other, gold = (*rng.sample(range(4), 2), rng.randrange(4))
            reply = wording.format(L=LETTERS[said], l=LETTERS[said].lower(), M=LETTERS[other], text=options[said])
            yield options, gold if rng.random() < 0.5 else said, reply


def numbers(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(right number, reply)."""
    words = list(NUMBER_WORDS)
    for wording in NUMBER:
        for _ in range(10):
            n = rng.choice([0, 3, 5, 7, 12, 42, 100, 250, 2008])
            values = {
                "n": n,
                "near": round(n * 1.04, 2),
                "far": n + rng.choice([1, 13]),
                "words": words[n] if n < 11 else str(n),
            }
            yield str(n), wording.format(**values)


def texts(rng: random.Random) -> Iterator[tuple[list[str], str]]:
    """(ten answers, reply)."""
    pool = ["stop", "new york", "nokia", "blue", "2 dogs", "men's", "don't", "1,000", "u.s.", "two"]
    for wording in TEXT:
        for _ in range(10):
            a, b = rng.sample(pool, 2)
            yield [a] * rng.randrange(1, 11), wording.format(a=a, A=a.upper(), b=b, half=a[: len(a) // 2 + 1])


def rows(kind: str, seed: int = 0) -> list[Case]:
    """Cases of one kind: their row, the reply as both harnesses hand it over (stripped), our target and meta."""
    rng, made = random.Random(seed), []
    if kind == "choice":
        for options, gold, reply in choices(rng):
            listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, options))
            doc = dict(zip(LETTERS, options)) | {
                "answer": LETTERS[gold], "label": LETTERS[gold], "options": options, "choices": options, "idx": 0, "sub_task": "s",
                "text": f"What? {listed}", "question": "What?", "question_id": 0, "category": "perception/OCR", "index": 1, "qid": "x",
                "l2-category": "c", "question_image_type": "map", "data_type": "image", "type": "2D", "task": "t", "source": "s",
                "domain": "d", "sub_category": "s", "task_type": "t", "duration": "short", "videoID": "v", "relation": "r",
                "Correct Answer": f"({LETTERS[gold].lower()})", "l2_category": "l", "candidates": options, "data_source": "mp3d",
                "question_type": "multiple-choice", "id": "validation_Art_1", "gold": gold,
            }  # fmt: skip
            made.append((doc, reply, LETTERS[gold], {"options": options, "category": "c", "group": "0"}))
    elif kind == "yes_no":
        for reply, answer, _ in itertools.product(YES_NO, ("Yes", "No"), range(4)):
            doc = {"answer": answer, "question_id": 0, "category": "existence", "Question_Type": "yes_no", "Index": 0}
            meta = {"category": "existence", "pair": "0", "figure": "0", "question_pair": "0", "set": "0"}
            made.append((doc, reply, answer, meta | {"group": "0", "place": 0}))
    elif kind == "number":
        for wanted, reply in numbers(rng):
            doc = {"answer": wanted, "number": int(wanted), "type": "human_test", "options": [], "ground_truth": wanted}
            doc |= {"question_type": "object_counting", "task": "depth_prediction_oc", "Answer": [wanted]}
            doc |= {"Question Type": "Factoid", "Year": ["YES" if wanted == "2008" else "NO"]}
            meta = {"question_type": "object_counting", "task": "depth_prediction_oc", "type": "Factoid"}
            made.append((doc, reply, wanted, meta | {"year": doc["Year"]}))
    elif kind == "box":
        for wording, _ in itertools.product(BOX, range(10)):
            x, y, w, h = (rng.uniform(low, high) for low, high in ((0, 0.5), (0, 0.5), (0.1, 0.5), (0.1, 0.5)))
            moved = [edge + rng.uniform(-0.06, 0.06) for edge in (x, y, x + w, y + h)]
            reply = wording.format(**{name: round(abs(edge), 3) for name, edge in zip("abcd", moved)})
            doc = {"bbox": [x, y, x + w, y + h], "question_id": 0, "answer": "the cat"}
            made.append((doc, reply, [1000 * x, 1000 * y, 1000 * w, 1000 * h], {"width": 1000, "height": 1000}))
    else:
        for answers, reply in texts(rng):
            doc = {
                "answers": answers,
                "answer": answers[0],
                "question_id": 0,
                "dataset": "IIIT5K",
                "question_type": "t",
            }
            made.append(
                (doc, reply, answers, {"question": "what is it?", "answer_type": "abstractive", "dataset": "IIIT5K"})
            )
    return [(doc, reply.strip(), target, meta) for doc, reply, target, meta in made]


def theirs() -> dict[str, Rule]:
    """Task → (kind of rows, lmms-eval's score, our headline, our copy of their rule, why the headline differs)."""
    for name in (
        "spacy",
        "nltk",
        "nltk.stem",
        "Levenshtein",
    ):  # of halves that are not asked here: AMBER's captions, MathVista's options
        with contextlib.suppress(ModuleNotFoundError):
            __import__(name)
            continue
        sys.modules[name] = unittest.mock.MagicMock()
    from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
    from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter
    from lmms_eval.tasks.amber_g.utils import process_discriminative_task
    from lmms_eval.tasks.blink.utils import blink_process_results
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results
    from lmms_eval.tasks.chartqapro.utils import chartqapro_process_results
    from lmms_eval.tasks.countbenchqa.utils import countbenchqa_process_results
    from lmms_eval.tasks.cv_bench.utils import cv_bench_process_results
    from lmms_eval.tasks.dude.utils import dude_process_results
    from lmms_eval.tasks.embspatial.utils import embspatial_process_results
    from lmms_eval.tasks.mathvision.utils import mathvision_process_results
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
    from lmms_eval.tasks.mme.utils import mme_process_results
    from lmms_eval.tasks.mme_realworld.utils import mme_realworld_process_results
    from lmms_eval.tasks.mmmu.utils import get_multi_choice_info, parse_multi_choice_response
    from lmms_eval.tasks.mmmu_pro.utils import mmmu_pro_process_results
    from lmms_eval.tasks.mmstar.utils import mmstar_process_results
    from lmms_eval.tasks.mmt.utils import mmt_process_results
    from lmms_eval.tasks.mmvp.utils import mmvp_process_results
    from lmms_eval.tasks.multidocvqa.utils import multidocvqa_aggregate_results_anls
    from lmms_eval.tasks.mvbench.utils import mvbench_process_results
    from lmms_eval.tasks.naturalbench.utils import extract_answer
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
    from lmms_eval.tasks.omni_spatial.utils import omni_spatial_process_results
    from lmms_eval.tasks.pope.utils import pope_process_results
    from lmms_eval.tasks.realworldqa.utils import realworldqa_process_results
    from lmms_eval.tasks.refcoco.utils_rec import compute_iou, refcoco_bbox_rec_process_result
    from lmms_eval.tasks.sat.utils import MultiChoiceRegexFilter as SatFilter
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results
    from lmms_eval.tasks.seedbench.utils import seed_process_result as seed_process
    from lmms_eval.tasks.seedbench_2_plus.utils import seed_process_result
    from lmms_eval.tasks.slidevqa.utils import slidevqa_process_results
    from lmms_eval.tasks.sparbench.utils import sparbench_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.videomme.utils import videomme_process_results
    from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val
    from lmms_eval.tasks.vsibench.utils import vsibench_process_results
    from lmms_eval.tasks.vstar_bench.utils import vstar_process_results

    module = __import__("lmms_eval.tasks.3dsrbench.utils", fromlist=["process_results"])
    spar_module = __import__("lmms_eval.tasks.sparbench.utils", fromlist=["process_results"])

    def ten(doc: Doc) -> Doc:
        return {"answers": (doc["answers"] * 10)[:10], "question_id": 0}

    def equal(found: str, gold: str) -> float:
        return float(found.lower() == gold.lower())

    def mmmu(doc: Doc, reply: str) -> float:
        random.seed(42)
        index2ans, every = get_multi_choice_info(doc["options"])
        return equal(parse_multi_choice_response(reply, every, index2ans), doc["answer"])

    def mmt(doc: Doc, reply: str) -> float:
        random.seed(42)
        return mmt_process_results(doc, [reply])["accuracy"]["overall"]

    def ai2d(doc: Doc, reply: str) -> float:
        found = MultiChoiceRegexFilter(regex_pattern="x").apply([[reply]], [doc])[0]
        return bare_match(found, doc["answer"])

    def bare_match(found: str, gold: str) -> float:
        return float(exact_match_hf_evaluate([found], [gold], ignore_case=True, ignore_punctuation=True)["exact_match"])

    def spar_mended(doc: Doc, reply: str) -> float:
        spar_module.partial = functools.partial
        try:
            return spar(doc, reply)
        finally:
            del spar_module.partial

    def spar(doc: Doc, reply: str) -> float:
        return float(sparbench_process_results(dict(doc), [reply])["sparbench_score"]["MRA:.5:.95:.05"])

    def mmmu_pro(doc: Doc, reply: str) -> float:
        random.seed(42)
        row = doc | {"options": repr(doc["options"]), "subject": "s"}
        return equal(mmmu_pro_process_results(row, [reply])["mmmu_acc"]["parsed_pred"], doc["answer"])

    judge_free = object.__new__(MMBench_Evaluator)

    def mmbench(doc: Doc, reply: str) -> float:
        """Their rule before a language model is asked; what it leaves open counts as wrong here."""
        return equal(str(judge_free.can_infer(reply, dict(zip(LETTERS, doc["options"])))), doc["answer"])

    def amber(doc: Doc, reply: str) -> float:
        counts: collections.Counter[str] = collections.Counter()
        truth = {"type": "discriminative-hallucination", "truth": doc["answer"].lower()}
        process_discriminative_task({"question_id": 0, "text": reply}, truth, counts)
        return float(counts["qa_correct_score"])

    def boxed(doc: Doc, reply: str) -> float:
        return float(
            compute_iou(doc["bbox"], refcoco_bbox_rec_process_result(doc, [reply])["refcoco_IoU"]["pred"]) >= 0.5
        )

    def sat(doc: Doc, reply: str) -> float:
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, doc["options"]))
        found = SatFilter(regex_pattern="x").apply([[reply]], [{"question": listed}])[0]
        return bare_match(found, doc["answer"])

    letter, guess = (
        "our letter rule reads denials, corrections and option texts, and never guesses",
        "their parser guesses at random",
    )
    return {
        "mmvp": ("choice2", lambda d, r: mmvp_process_results(d, [r])["mmvp_accuracy"]["is_correct"], "letter", None, letter),
        "blink": ("choice", lambda d, r: blink_process_results(d, [r])["blink_acc"]["is_correct"], "letter", None, letter),
        "vstar": ("choice", lambda d, r: vstar_process_results(d, [r])["vstar_overall_acc"]["score"], "letter", None, letter),
        "realworldqa": (
            "choice", lambda d, r: realworldqa_process_results(d, [r])["exact_match"], "choice_or_exact", "letter_ranked", letter),
        "seed2_plus": (
            "choice", lambda d, r: equal(seed_process_result(d, [r])["seedbench_2_plus_all"]["pred"], d["answer"]), "letter",
            "letter_first", letter),
        "mmt_bench": ("choice", mmt, "letter", None, f"{letter}; {guess}"),
        "mme_realworld": (
            "choice", lambda d, r: equal(mme_realworld_process_results(d, [r])["mme_realworld_score"]["pred_answer"], d["answer"]),
            "letter_mmerealworld", None, "their rule takes an empty reply for A"),
        "3dsrbench": ("choice", lambda d, r: module.process_results(d, [r])["vanilla_accuracy"]["score"], "letter", None, letter),
        "embspatial": (
            "choice", lambda d, r: embspatial_process_results(d | {"answer": d["gold"]}, [r])["embspatial_acc"]["is_correct"],
            "letter", None, letter),
        "cv_bench": ("choice", lambda d, r: cv_bench_process_results(d, [r])["cv_bench_acc"]["is_correct"], "letter_cvbench",
                     None, "their rule reads a letter that follows later"),
        "mmstar": ("choice", lambda d, r: mmstar_process_results(d, [r])["average"]["score"], "letter", "letter_ranked", letter),
        "videomme": ("choice", lambda d, r: videomme_process_results(d, [r])["videomme_perception_score"]["score"],
                     "letter_videomme", "letter_ranked", "lmms-eval has left the published rule for a ranked extractor"),
        "mvbench": ("choice",
                    lambda d, r: mvbench_process_results(d | {"answer": d["options"][d["gold"]]}, [r])["mvbench_accuracy"]["score"],
                    "letter", "letter_mvbench", letter),
        "scienceqa": ("choice", lambda d, r: sqa_process_results(d | {"answer": d["gold"]}, [r])["exact_match"], "letter",
                      "letter_scienceqa", letter),
        "ai2d": ("choice", ai2d, "letter", "letter_ai2d", letter),
        "mmbench": ("choice", mmbench, "letter", None, f"{letter}; what theirs leaves open goes to a language model"),
        "seed": ("choice", lambda d, r: equal(seed_process(d, [r])["seed_all"]["pred"], d["answer"]), "letter", "letter_first", letter),
        "omnispatial": ("choice", lambda d, r: omni_spatial_process_results(d | {"answer": d["gold"]}, [r])["omni_spatial_score"]["score"],
                        "letter", "letter_first", f"{letter}; theirs takes thoughts off first"),
        "sat": ("choice", sat, "letter", None, f"{letter}; theirs reads the first word without its signs"),
        "mmmu_pro": ("choice", mmmu_pro, "mmmu_pro", None, f"the published rule; {guess}"),
        "mmmu": ("choice", mmmu, "mmmu", {"name": "mmmu_lmms_eval"}, f"the published rule; {guess}"),
        "pope": ("yes_no", lambda d, r: pope_process_results(d, [r])["pope_accuracy"]["score"], "pope_official", "exact_match",
                 "lmms-eval compares the whole reply"),
        "mme": ("yes_no", lambda d, r: mme_process_results(d, [r])["mme_perception_score"]["score"], "mme", None, ""),
        "naturalbench": ("yes_no", lambda d, r: float(extract_answer(r, "yes_no") == (d["answer"] == "Yes")), "naturalbench", None, ""),
        "hallusionbench": ("yes_no", lambda d, r: float(("yes" in r.lower()) == (d["answer"] == "Yes")), "hallusionbench", None,
                           "lmms-eval's rule without its judge: any 'yes' in the reply, else no; ours wants one of the two words"),
        "amber": ("yes_no", amber, "amber", None,
                  "lmms-eval looks for the letters of yes, then of no, anywhere ('none'); ours wants one of the two words"),
        "countbench": ("number", lambda d, r: countbenchqa_process_results(d, [r])["acc"], "count", None,
                       "lmms-eval wants the bare digits; ours reads words and sentences"),
        "chartqa": ("number", lambda d, r: chartqa_process_results(d, [r])["relaxed_overall"], "relaxed_pix2struct",
                    "relaxed_stripped", ""),
        "chartqapro": ("number", lambda d, r: float(chartqapro_process_results(d, [r])["relaxed_overall"]), "chartqapro", None, ""),
        "vsibench": ("number", lambda d, r: float(vsibench_process_results(dict(d), [r])["vsibench_overall"]["MRA:.5:.95:.05"]), "vsibench",
                     None, "lmms-eval has left the published first token for the first number anywhere"),
        "sparbench": ("number", spar, "sparbench", None,
                      "lmms-eval 0.7.3 scores every number 0: its rule calls partial, which its file does not import"),
        "sparbench, import mended": ("number", spar_mended, "sparbench", None, "their rule divides by a target of 0 and counts it wrong"),
        "mathvision": ("number", lambda d, r: float(mathvision_process_results(d, [r])["mathvision_standard_eval"]["scores"][0]),
                       "math_answer", None, "latex2sympy reads what is no answer ('12 and 13'); ours takes off units and currency"),
        "textvqa": ("text", lambda d, r: textvqa_process_results(ten(d), [r])["exact_match"], "textvqa_m4c", None, ""),
        "vqav2": ("text", lambda d, r: vqav2_process_results_val(
            {"question_id": 0, "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(ten(d)["answers"])]}, [r])["exact_match"],
            "vqa_official", "vqa_evalai", "the published script leaves unanimous answers raw; lmms-eval normalises them"),
        "vizwiz": ("text", lambda d, r: vizwiz_vqa_process_results(ten(d), [r])["exact_match"], "textvqa_m4c", None, ""),
        "infovqa": ("text", lambda d, r: anls(d["answers"], [r])["anls"], "anls_rrc", "anls_rrc_raw", ""),
        "docvqa": ("text", lambda d, r: anls(d["answers"], [r])["anls"], "anls_rrc", "anls_rrc_raw", ""),
        "mpdocvqa": ("text", lambda d, r: multidocvqa_aggregate_results_anls(
            [{"questionId": 0, "answer": list(d["answers"]), "pred_answer": r}]), "anls_rrc", None, "inner white space is collapsed"),
        "dude": ("text", lambda d, r: dude_process_results(d, [r])["dude_anls"], "dude", None, ""),
        "slidevqa": ("text", lambda d, r: slidevqa_process_results(d, [r])["f1"], "slidevqa", None,
                     "lmms-eval follows VLMEvalKit's plain word overlap; ours is the authors' script"),
        "ocrbench": ("text", lambda d, r: float(ocrbench_process_results(d, [r])["ocrbench_accuracy"]["score"]), "ocrbench",
                     {"name": "ocrbench", "fold_full_width": True}, ""),
        "refcoco, refcoco+, refcocog": ("box", boxed, "box_iou", None,
                                        "lmms-eval wants square brackets, corners in order; ours any brackets, and swaps corners"),
        "gqa": ("text", lambda d, r: bare_match(r, d["answer"]),
                "gqa_llava", "gqa_lmms_eval", "LLaVA keeps punctuation inside"),
    }  # fmt: skip


def asked(score: Callable[[Doc, str], float], doc: Doc, reply: str) -> float:
    """Their score; 0 where their rule divides by a target of zero."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return float(score(doc, reply))
        except ZeroDivisionError:
            return 0.0


def two_options(cases: list[Case]) -> list[Case]:
    """The same questions with two options (MMVP)."""
    kept = []
    for doc, reply, target, meta in cases:
        if target in "AB":
            kept.append((doc, reply, target, meta | {"options": meta["options"][:2]}))
    return kept


def ours(spec: str | Doc, reply: str, target: Any, meta: Doc) -> tuple[float, str]:
    """(score with an unparsed reply as 0, rule that fired)."""
    metric = build_metric(spec)
    if metric.name.startswith(("vqa", "textvqa")):
        target = [{"answer": text, "answer_id": k} for k, text in enumerate((target * 10)[:10])]
    if metric.name.startswith("gqa"):
        target = target[0]
    score = metric.score(reply, target, meta)
    return Scored("", score, target).value, score.rule


def grouped() -> list[tuple[str, int, bool]]:
    """Totals over groups, which no single reply shows: (what, samples, equal?)."""
    import pandas as pd
    from lmms_eval.tasks.wemath.wemath_utils import (
        calculate_metrics,
        compute_final_scores,
        process_steps_data,
        update_main_results_df,
    )

    from mllm.eval.metrics import Score

    rng, made = random.Random(1), []
    for problem in range(525):
        kind = rng.choice(["2steps", "3steps"])
        parts = [*(str(k + 1) for k in range(int(kind[0]))), "multi"]
        made += [{"ID": problem, "key": f"{kind}_{part}", "joker": rng.random() < 0.6} for part in parts]
    frame = pd.DataFrame(made)
    steps = [process_steps_data(frame[frame["key"].str.contains(f"{n}steps")], n) for n in (2, 3)]
    table = update_main_results_df(*compute_final_scores(calculate_metrics(*steps), 525))
    items = [
        Scored(str(k), Score(float(row["joker"])), "A", {"problem": row["ID"], "key": row["key"]})
        for k, row in enumerate(made)
    ]
    totals = build_metric("wemath").aggregate(items)
    same = [
        f"{totals[mine]:.2f}%" == table[f"Score ({name})"] for mine, name in (("score", "Strict"), ("loose", "Loose"))
    ]
    module = __import__("lmms_eval.tasks.3dsrbench.utils", fromlist=["x"])
    sample = [f"Q{k:07d}{flip}{turn}" for k in range(60) for flip in ("", "-flip") for turn in ("", "-1")]
    right = [{"qid": name, "score": float(rng.random() < 0.8)} for name in sample]
    items = [
        Scored(r["qid"], Score(r["score"]), "A", {
            "group": r["qid"][:8], "flip": r["qid"].replace("-flip", ""), "circular": r["qid"][:13] if "-flip" in r["qid"] else r["qid"][:8]
        }) for r in right
    ]  # fmt: skip
    mine = build_metric({"name": "letter_groups", "also": ["flip", "circular"]}).aggregate(items)
    wanted = {"score": module.aggregate_flip_circular_accuracy, "flip": module.aggregate_flip_accuracy,
              "circular": module.aggregate_circular_accuracy}  # fmt: skip
    alike = all(abs(mine[name] - 100 * rule(right)) < 1e-9 for name, rule in wanted.items())
    return [("wemath, strict and loose", len(made), all(same)), ("3dsrbench, flip and circular", len(right), alike)]


def table(rules: Mapping[str, Rule]) -> None:
    """Print one line a task, and on stderr examples of what differs."""
    made = {kind: rows(kind) for kind in ("choice", "yes_no", "number", "text", "box")}
    made["choice2"] = two_options(made["choice"])
    print(
        "| task | rows | headline | equal | copy of their rule | equal | what differs |\n|---|---|---|---|---|---|---|"
    )
    for task, (kind, score, headline, copy, why) in rules.items():
        cases, differing, apart = made[kind], {}, 0
        for doc, reply, target, meta in cases:
            said = asked(score, ast.literal_eval(repr(doc)), reply)
            mine, rule = ours(headline, reply, target, meta)
            if abs(mine - said) > 1e-6:
                differing.setdefault((rule, said > mine), []).append((reply, target, said, mine))
            if copy is not None:
                apart += abs(ours(copy, reply, target, meta)[0] - said) > 1e-6
        count = sum(map(len, differing.values()))
        theirs_rule = f"`{copy['name'] if isinstance(copy, dict) else copy}`" if copy else ""
        second = f"{len(cases) - apart}" if copy else ""
        cell = why if count else ""
        print(f"| {task} | {len(cases)} | `{headline}` | {len(cases) - count} | {theirs_rule} | {second} | {cell} |")
        for (rule, _), examples in sorted(differing.items(), key=lambda entry: -len(entry[1]))[:4]:
            reply, target, said, mine = examples[0]
            shown = target[:1] if isinstance(target, list) else target
            print(
                f"    {task}: {len(examples)} × {rule}: {reply!r} for {shown!r}: theirs {said:g}, ours {mine:g}",
                file=sys.stderr,
            )


def main() -> None:
    if len(sys.argv) > 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    sys.path.extend(sys.argv[1:])
    from loguru import logger

    logger.remove()
    table(theirs())
    for what, count, same in grouped():
        print(f"| {what} | {count} | totals | {'equal' if same else 'DIFFERENT'} | | | |")


if __name__ == "__main__":
    main()
