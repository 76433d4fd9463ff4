"""Do our rules give VLMEvalKit's verdicts, reply by reply, on the tasks that both have?

    git clone https://github.com/open-compass/VLMEvalKit
    uv pip install --target FOLDER --no-deps validators termcolor timeout-decorator sty portalocker json-repair
    python benchmarks/eval_agreement_vlmevalkit.py VLMEvalKit FOLDER      # the second table of eval/README.md

Their scoring functions run as they are, of one file each; the package around them (models, judges, downloads) is not opened. The replies
are those of `eval_agreement.py`. Where a language model would decide what their rules leave open, that counts as wrong here.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

from eval_agreement import LETTERS, Doc, Rule, table


def room(name: str, folder: Path) -> types.ModuleType:
    """A package of theirs without what its ``__init__`` would import."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
    return module


def theirs(place: Path) -> dict[str, Rule]:
    """Task → (kind of rows, VLMEvalKit's score, our headline, our copy of their rule, why the headline differs)."""
    room("vlmeval", place / "vlmeval")
    importlib.import_module("vlmeval.smp")
    room("vlmeval.dataset", place / "vlmeval/dataset")
    utils: Any = room("vlmeval.dataset.utils", place / "vlmeval/dataset/utils")
    utils.build_judge, utils.DEBUG_MESSAGE = None, ""
    vqa: Any = importlib.import_module("vlmeval.dataset.utils.vqa_eval")
    utils.levenshtein_distance = vqa.levenshtein_distance

    def part(name: str) -> Any:
        return importlib.import_module(f"vlmeval.{name}")

    matching, yes = part("utils.matching_util"), part("dataset.utils.yorn")
    tally, natural, slides = part("dataset.utils.tallyqa"), part("dataset.utils.naturalbench"), part("dataset.slidevqa")
    vista, vision, charts = part("dataset.utils.mathvista"), part("dataset.utils.mathv"), part("dataset.chartbench")

    def choice(doc: Doc, reply: str) -> float:
        return float(matching.can_infer(reply, dict(zip(LETTERS, doc["options"]))) == doc["answer"])

    def yes_no(doc: Doc, reply: str) -> float:
        return float(yes.YOrN_Extraction(reply) == doc["answer"])

    def line(answers: list[str], reply: str, method: str, data: str) -> float:
        found = vqa.process_line({"answer": repr(answers), "prediction": reply}, method=method)
        return float(vqa.hit_calculate([found], data)[0])

    def counted(doc: Doc, reply: str) -> float:
        return float(tally.extract_count_from_prediction(reply) == int(doc["answer"]))

    def mathvista(doc: Doc, reply: str) -> float:
        row = {"question_type": "free_form", "answer_type": "integer", "answer": doc["answer"], "res": reply}
        return float(bool(vista.post_check(row)))

    def mathvision(doc: Doc, reply: str) -> float:
        return float(bool(vision.post_check({"answer": doc["answer"], "res": reply, "choices": "[]"})))

    letter = "our letter rule reads denials, corrections and option texts; theirs gives the rest to a language model"
    every = (
        "mmbench",
        "mmstar",
        "mmt_bench",
        "blink",
        "realworldqa",
        "seed",
        "seed2_plus",
        "ai2d",
        "scienceqa",
        "mmmu",
        "vstar",
        "embspatial",
    )
    stars = "theirs does not read the word in '**Yes**'"
    wants = "theirs wants the whole reply to be the number, after a language model cut it out"
    return {
        f"{', '.join(every)}, 3dsrbench": ("choice", choice, "letter", None, letter),
        "mmvp": ("choice2", lambda d, r: choice(d | {"options": d["options"][:2]}, r), "letter", None, letter),
        "pope": ("yes_no", yes_no, "pope_official", "pope_strict", "the published rule reads no from 'not' and any other reply as yes"),
        "mme": ("yes_no", yes_no, "mme", None, "the published rule reads the first four letters"),
        "hallusionbench": ("yes_no", yes_no, "hallusionbench", None, stars),
        "amber": ("yes_no", yes_no, "amber", None, stars),
        "naturalbench": ("yes_no", lambda d, r: float(natural.extract_answer(r) == (d["answer"] == "Yes")), "naturalbench", None,
                         "theirs takes the earlier of two words"),
        "countbench": ("number", lambda d, r: float(d["answer"] in r), "count", None,
                       "theirs looks for the digits anywhere, so that 12 holds 2; ours reads the number and number words"),
        "tallyqa": ("number", counted, "count", "count_first", "theirs takes the first number, up to 20"),
        "chartqa, plotqa": ("number", lambda d, r: line([d["answer"]], r, "relaxed_accuracy", "ChartQA"), "relaxed_pix2struct", None, ""),
        "chartbench": ("number", lambda d, r: float(charts.relaxed_correctness(d["answer"], r)), "chartbench", None, ""),
        "mathvista": ("number", mathvista, "mathvista", None, wants),
        "mathvision": ("number", mathvision, "math_answer", None, wants),
        "textvqa": ("text", lambda d, r: line((d["answers"] * 10)[:10], r, "vqa_score", "TextVQA"), "textvqa_m4c", "vqa_evalai",
                    "theirs keeps the period of '1,000.'"),
        "docvqa, infovqa": ("text", lambda d, r: line(d["answers"], r, "anls", "DocVQA"), "anls_rrc", "anls_rrc_raw", ""),
        "slidevqa": ("text", lambda d, r: float(slides.get_f1(d["answers"][0], r)), "slidevqa", None,
                     "theirs is plain word overlap; ours is the authors' script"),
    }  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    sys.path.extend(sys.argv[2:])
    sys.path.append(sys.argv[1])
    table(theirs(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
