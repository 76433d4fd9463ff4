"""Do the text metrics give the values worked out by hand from each benchmark's own rules?"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from mllm.errors import ConfigError, DataError
from mllm.eval.metrics import METRICS, Score, Scored, build_metric
from mllm.eval.metrics.text import EditDistances, edit_distance
from mllm.eval.metrics.vqa import CONTRACTIONS, normalise_m4c, normalise_vqa, strip_punctuation


def value(name, prediction, target, **meta):
    return build_metric(name).score(prediction, target, meta).value


def test_every_registered_metric_has_a_protocol_and_a_version():
    assert len(METRICS) >= 40
    for name in METRICS:
        metric = METRICS.get(name)
        assert metric.name == name and len(metric.protocol) > 20 and metric.version.isdigit()


def test_unknown_metric_and_unknown_option_are_named():
    with pytest.raises(ConfigError, match="did you mean 'vqa_evalai'"):
        build_metric("vqa_evalia")
    with pytest.raises(ConfigError, match="colour"):
        build_metric({"name": "mmmu", "colour": 1})


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("", "", 0), ("a", "", 1), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(left, right, distance):
    assert edit_distance(left, right) == edit_distance(right, left) == distance


def test_edit_distance_agrees_with_the_table_it_stands_for():
    def table(left, right):
        row = list(range(len(right) + 1))
        for i, a in enumerate(left, 1):
            diagonal, row[0] = row[0], i
            for j, b in enumerate(right, 1):
                diagonal, row[j] = row[j], min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
        return row[-1]

    generator = random.Random(0)
    for _ in range(400):
        left, right = ("".join(generator.choices("abcß ", k=generator.randint(0, 90))) for _ in range(2))
        assert edit_distance(left, right) == table(left, right), (left, right)
    for _ in range(60):  # side by side no pattern touches another
        *several, text = ("".join(generator.choices("ab ", k=generator.randint(0, 9))) for _ in range(5))
        assert EditDistances(several)(text) == [table(pattern, text) for pattern in several], (several, text)


# VQA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_number_of_matching_humans(matches, expected):
    humans = ["red"] * matches + [f"other{k}" for k in range(10 - matches)]
    assert value("vqa_evalai", "Red.", humans) == pytest.approx(expected)


def test_official_vqa_compares_unanimous_answers_raw():
    assert value("vqa_official", "Yes", ["yes"] * 10) == 0.0
    assert value("vqa_official", "yes.", ["yes"] * 10) == 0.0
    assert value("vqa_evalai", "Yes.", ["yes"] * 10) == 1.0
    assert value("vqa_official", "Yes.", ["yes"] * 9 + ["no"]) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two dogs!", "2 dogs"), ("none", "0"), ("eleven", "eleven"), ("dont", "don't"), ("5.", "5"), (".5", ".5"),
        ("1,000", "1000"), ("red, blue", "red blue"), ("red,blue", "red blue"), ("x-ray", "x ray"), ("men's", "men's"),
        ("somebody'd", "somebodyd"), ("shes", "shes"), ("hes", "he's"), ("Im", "im"), ("its", "its"), ("50%", "50%"),
        ("a\nb\tc", "b c"),
    ],
)  # fmt: skip
def test_vqa_normal_form(text, normal):
    assert normalise_vqa(text) == normal


def test_vqa_table_of_contractions_is_complete():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've" and CONTRACTIONS["twas"] == "'twas"


def test_only_the_first_32_periods_are_removed():
    assert strip_punctuation(". " * 40).count(".") == 8


def test_m4c_splits_possessives_and_drops_commas_first():
    assert normalise_m4c("Men's, 1,000?") == "men 's 1000"
    assert value("textvqa_m4c", "1,000", ["1000"] * 4 + ["x"] * 6) == 1.0


def test_vqa_needs_an_answer_and_a_single_one_is_compared_directly():
    with pytest.raises(DataError, match="no reference"):
        value("vqa_evalai", "x", [])
    assert value("vqa_evalai", "cat", ["cat"]) == 1.0
    assert value("stvqa_accuracy", "The Cat", ["dog", "cat"]) == 1.0


def test_vqa_accepts_the_official_answer_dictionaries():
    humans = [{"answer": "cat", "answer_id": k} for k in range(10)]
    assert value("vqa_evalai", "cat", humans) == 1.0


# Relaxed accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("105", "100", True), ("105.1", "100", False), ("1.05", "1", False), ("2008", "2010", True),
        ("0.05", "5%", True),
        ("5", "5%", False), ("5%%", "5%", True), ("0.0", "0", False), ("0", "0", True), ("1,000", "1000", False),
        ("YES", "yes", True), ("YES ", "yes", False), ("nan", "nan", True), ("3", "nan", False), ("inf", "inf", False),
        ("1e3", "1000", True), ("1_000", "1000", True), ("٥", "5", True), (" 5 ", "5", True), ("$5", "5", False),
    ],
)  # fmt: skip
def test_relaxed_accuracy_of_pix2struct(prediction, target, right):
    expected = right if (prediction, target) != ("nan", "nan") else False
    assert value("relaxed_pix2struct", prediction, target) == float(expected)


def test_relaxed_takes_the_best_reference_and_the_stripped_variant_strips():
    assert value("relaxed_pix2struct", "7", ["3", "7"]) == 1.0
    assert value("relaxed_stripped", "YES ", "yes") == 1.0


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("2008", "2010", False), ("2010.", "2010", True), ("2010", "2010", True), ("1.05", "1", True),
        ("0.0", "0", True),
        ("0.001", "0", False), ("1,000", "1000", True), ("$1,020", "1000", True), ("5 million", "5000000", True),
        ("5%", "5", True), ("0.05", "5%", True), ("50", "5%", False), ("12 kg", "12", True), ("12 kg", "12 lb", False),
        ("12 kg", "12kg", True), ("Yes.", "yes", True), ("no", "yes", False), ("(5)", "-5", True),
        ("2 and 3", "2", False),
        ("-$5", "-5", True), ("$-5", "-5", True), ("- $5", "-5", True), ("US$5", "5", True), ("-US$5", "-5", True),
        ("USD 5", "5", True), ("5 USD", "5", True), ("5 €", "5", True), ("($5)", "-5", True), ("$(5)", "-5", True),
        ("-$5", "5", False), ("--5", "5", False), ("-(5)", "5", False), ("Rs. 500", "500", True),
        ("5 m", "5", True), ("5 m", "5000000", True), ("5 m", "5 million", True), ("5", "5 m", True),
        ("5 m", "5 km", False), ("5 million", "5", False), ("$5M", "5000000", True), ("5 k", "5 km", False),
        ("5 m people", "5000000", True), ("-5.3 bn", "-5300000000", True), ("5 - 7", "5", False),
        ("[1, 2]", "[1, 2]", True), ("[1]", "[1, 2]", False), ("1999", "1500", False), ("1520", "1500 cars", True),
    ],
)  # fmt: skip
def test_relaxed_strict(prediction, target, right):
    assert value("relaxed_strict", prediction, target) == float(right)


def test_relaxed_strict_says_which_reading_of_a_unit_fitted():
    metric = build_metric("relaxed_strict")
    assert metric.score("5 m", "5", {}).rule == "number within 5% (m as a unit)"
    assert metric.score("5 m", "5000000", {}).rule == "number within 5% (m as million)"
    assert metric.score("12 kg", "12 lb", {}).rule == "different units"


def test_relaxed_strict_takes_a_year_flag_and_an_empty_reply_is_unparsed():
    assert value("relaxed_strict", "21", "20", is_year=True) == 0.0
    assert value("relaxed_strict", " . ", "20") is None


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("842 - 616 = 226", "226", True),
        ("842 - 616 = 300", "226", False),
        ("842, 616 = yes", "yes", True),
        ("-3.5 - -12 = 8.5", "8.5", True),
        ("226", "226", True),
        ("226 = 226 = 226", "226", False),  # one step, not a guess at every number
        ("value = 226", "226", False),  # words before it are a sentence, whose answer is not known
        ("842 - 616 =", "616", False),
    ],
)
def test_a_worked_answer_is_what_follows_the_equals_sign(prediction, target, right):
    assert build_metric({"name": "relaxed_strict", "worked": True}).score(prediction, target, {}).value == float(right)
    if " = " in prediction:
        assert value("relaxed_strict", prediction, target) == 0.0


# ANLS -----------------------------------------------------------------------------------------------------------------


def test_anls_at_exactly_one_half_depends_on_the_protocol():
    assert value("anls_rrc", "abxx", "abcd") == 0.5
    assert value("anls_strict", "abxx", "abcd") == 0.0
    assert value("anls_rrc", "axxx", "abcd") == 0.0


def test_anls_padding_hole_is_open_in_the_raw_script_only():
    padded = "zzzz" + " " * 100
    assert value("anls_rrc_raw", padded, "abcd") == pytest.approx(1 - 4 / 104)
    assert value("anls_rrc", padded, "abcd") == 0.0


def test_anls_is_case_blind_takes_the_best_reference_and_defines_empty():
    assert value("anls_rrc", " Hello   World ", ["bye", "hello world"]) == 1.0
    assert value("anls_rrc", "hello", "hallo") == pytest.approx(0.8)
    assert value("anls_rrc", "", "") == value("anls_rrc_raw", "", "") == 1.0
    assert value("anls_rrc_raw", "straSe", "straße") == pytest.approx(1 - 1 / 7)
    assert value("anls_rrc", "straß", "straße") == pytest.approx(0.857, abs=5e-4)  # the server counts STRASSE: 7
    assert value("anls_strict", "straß", "straße") == pytest.approx(1 - 1 / 6)


# MMMU -----------------------------------------------------------------------------------------------------------------

OPTIONS = ["red wine", "white cat", "blue", "a very long text"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("The answer is B", "B"), ("A or B then A", "A"), ("b", None),
        ("B)", None),
        ("**B**", None), ("answer:B", None), ("A. text", None), ("I think it must be the white cat", "B"),
        ("white cat", None), ("not red wine it must be blue", "C"), ("(A) no, (C)", "C"),
    ],
)  # fmt: skip
def test_mmmu_choice_parser(reply, letter):
    score = build_metric("mmmu").score(reply, "B", {"question_type": "multiple-choice", "options": OPTIONS})
    assert (score.extracted or None) == letter and score.value == (None if letter is None else float(letter == "B"))


def test_mmmu_letter_rules_of_lmms_eval_and_of_mmmu_pro():
    meta = {"question_type": "multiple-choice", "options": OPTIONS}
    assert build_metric("mmmu_lmms_eval").score("PIZZA is", "A", meta).extracted == "A"
    assert build_metric("mmmu_lmms_eval").score("A. red", "A", meta).extracted == "A"
    assert build_metric("mmmu_pro").score("x (A) y. Answer: B", "B", meta).extracted == "B"
    assert build_metric("mmmu_pro").score("x (A) y. Answer: B or C", "B", meta).extracted == "A"


def test_mmmu_random_fallback_is_fixed_by_seed_and_sample():
    metric = build_metric({"name": "mmmu", "random_fallback": 42})
    meta = {"question_type": "multiple-choice", "options": OPTIONS}
    first = [metric.score(f"hm {k}", "B", meta).extracted for k in range(40)]
    assert first == [metric.score(f"hm {k}", "B", meta).extracted for k in range(40)] and set(first) == set("ABCD")
    assert metric.label == "mmmu(random_fallback=42) v1"


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        ("the answer is not 5 but 12", "5", True), ("So x = 3.14159", "3.14", True), ("it is 1,200", "1200", True),
        ("about 50%", "50", True), ("50%", "50%", True), ("the final result is the Cat.", "cat", True),
        ("9", "12", False),
        ("C", "C", True), ("cat", "c", False), ("nothing", ["x", "nothing"], True),
    ],
)  # fmt: skip
def test_mmmu_open_questions(reply, gold, right):
    assert value("mmmu", reply, gold, question_type="open") == float(right)


def test_mmmu_sums_up_by_domain_and_kind():
    metric = build_metric("mmmu")
    rows = [("Art", 1.0), ("Music", 0.0), ("Physics", None), ("Physics", 1.0)]
    items = [Scored(str(k), Score(v), "A", {"category": s, "question_type": "open"}) for k, (s, v) in enumerate(rows)]
    totals = metric.aggregate(items)
    assert totals["score"] == 50.0 and totals["Art and Design"] == 50.0 and totals["Science"] == 50.0
    assert totals["Physics"] == 50.0 and totals["open"] == 50.0


# Letters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B. blue", None), ("B. white cat", "B"), ("**B**", "B"), ("The answer is B because", "B"),
        ("Answer: (C)", "C"), ("white cat", "B"), ("A cat is shown", None), ("I would say A or B", None), ("", None),
        ("Because of the colour", None), ("It is (D), clearly", "D"), ("Option C", "C"), ("F", None), ("It is A.",
        "A"), ("B, because", "B"), ("B, C", None),
        ("Perhaps A is right", None),
    ],
)  # fmt: skip
def test_our_letter_rule_never_guesses(reply, letter):
    score = build_metric("letter").score(reply, "B", {"options": OPTIONS})
    assert (score.extracted or None) == letter and (score.value is None) == (letter is None)


CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "letters.jsonl").read_text().splitlines()]


def test_negation_alternatives_revisions_and_option_texts_decide_which_letter_is_read():
    metric, wrong = build_metric("letter"), []
    for case in CASES:
        score = metric.score(case["reply"], "A", {"options": case["options"]})
        if (score.extracted or None) != case["read"] or (score.value is None) != (case["read"] is None):
            wrong.append(f"{case['reply']!r}: {score.extracted or None} ({score.rule}), right is {case['read']}")
    assert len(CASES) > 300 and not wrong, "\n".join(wrong)


def test_a_letter_rule_without_options_knows_letters_only():
    for reply, letter in {"The answer is K": "K", "Answer: A or K": None, "not K": None, "I think so": None}.items():
        assert (build_metric("letter").score(reply, "K", {}).extracted or None) == letter


def test_letter_targets_may_be_letters_brackets_or_the_options_text():
    for target in ("B", "(B)", "b.", "white cat"):
        assert value("letter", "B", target, options=OPTIONS) == 1.0
    with pytest.raises(DataError, match="neither a letter nor"):
        value("letter", "B", "green", options=OPTIONS)


@pytest.mark.parametrize(
    ("name", "reply", "letter"),
    [
        ("letter_ranked", "A cat is shown", "A"), ("letter_ranked", "Not A. It is (C)", "C"),
        ("letter_ranked", "the answer is B", "B"), ("letter_ranked", "x A: or B: y", "B"),
        ("letter_ranked", "hmm", None),
        ("letter_scienceqa", "B", "B"), ("letter_scienceqa", "B. blue", "B"), ("letter_scienceqa", "B.", None),
        ("letter_scienceqa", "The answer is B.", "B"), ("letter_scienceqa", "The answer is B. The answer is C.", None),
        ("letter_first", " because", "B"), ("letter_ai2d", " B. blue", "B"), ("letter_ai2d", "b!", "B"),
        ("letter_ai2d", "blue", None), ("letter_videomme", "The answer is B", "B"),
        ("letter_videomme", "Based on it", "B"), ("letter_videomme", "Answer: B", "A"),
        ("letter_videomme", "The best option is B", "B"), ("letter_videomme", "Option: C", "C"),
        ("letter_mvbench", "I have a look", "A"), ("letter_mvbench", "(C) it", "C"), ("letter_mvbench", "d. it", "D"),
        ("letter_cvbench", "The cat", "T"), ("letter_cvbench", "( b )", "B"), ("letter_cvbench", "42", None),
    ],
)  # fmt: skip
def test_published_letter_rules(name, reply, letter):
    score = build_metric(name).score(reply, "B", {"options": OPTIONS})
    assert (score.extracted if score.value is not None else None) == letter


def test_cv_bench_weighs_its_sources():
    metric = build_metric("letter_cvbench")
    rows = [("ADE20K", 1.0), ("ADE20K", 1.0), ("COCO", 0.0), ("Omni3D", 1.0), ("Omni3D", None)]
    items = [Scored(str(k), Score(v), "A", {"source": s}) for k, (s, v) in enumerate(rows)]
    totals = metric.aggregate(items)
    assert totals["2D"] == 50.0 and totals["3D"] == 50.0 and totals["score"] == 50.0
    assert metric.aggregate(items[:3])["score"] == 50.0  # without Omni3D, what there is


# Closed answers -------------------------------------------------------------------------------------------------------


def test_gqa_rules_differ_on_punctuation():
    assert value("gqa_llava", "Yes.", "yes") == 1.0 and value("gqa_lmms_eval", "Yes!", "yes") == 1.0
    assert value("gqa_llava", "t-shirt", "tshirt") == 0.0 and value("gqa_lmms_eval", "t-shirt", "tshirt") == 1.0
    assert value("exact_match", " The  Cat. ", "the cat") == 1.0


# Yes and no -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("No, there is not.", "no"), ("no", "no"), ("NO", "yes"), ("nope", "yes"), ("no\n", "yes"),
        ("isn't", "yes"), ("", "yes"),
        ("Yes. No.", "yes"), ("It is not", "no"),
    ],
)  # fmt: skip
def test_pope_reads_answers_as_published(reply, said):
    assert build_metric("pope_official").score(reply, "yes", {}).extracted == said


def test_pope_strict_wants_exactly_one_of_yes_and_no():
    metric = build_metric("pope_strict")
    assert metric.score("NO!", "no", {}).value == 1.0 and metric.score("Yes, it is", "no", {}).value == 0.0
    assert metric.score("yes and no", "no", {}).value is None and metric.score("", "no", {}).value is None


def test_pope_totals_worked_by_hand():
    metric = build_metric("pope_official")
    table = [
        ("yes", "yes", "a"),
        ("yes", "no", "a"),
        ("no", "yes", "a"),
        ("no", "no", "b"),
        ("yes", "yes", "b"),
        ("no", "no", "b"),
    ]
    items = [Scored(str(k), metric.score(p, t, {}), t, {"category": c}) for k, (p, t, c) in enumerate(table)]
    totals = metric.aggregate(items)
    # a: tp 1 fp 1 fn 1 → f1 1/2; b: tp 1 → f1 1. Pooled: tp 2 fp 1 fn 1 tn 2.
    assert totals["a/f1"] == 50.0 and totals["b/f1"] == 100.0 and totals["score"] == 75.0
    assert totals["accuracy"] == pytest.approx(400 / 6) and totals["precision"] == pytest.approx(200 / 3)
    assert totals["recall"] == pytest.approx(200 / 3) and totals["yes_ratio"] == 50.0


def test_pope_defines_what_upstream_divides_by_zero():
    metric = build_metric("pope_official")
    items = [Scored("1", metric.score("no", "no", {}), "no", {})]
    totals = metric.aggregate(items)
    assert totals["precision"] == totals["recall"] == totals["score"] == 0.0 and totals["accuracy"] == 100.0


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Yes.", "yes"),
        ("y", "yes"),
        ("n", "no"),
        ("not sure", "no"),
        ("know", "no"),
        ("None", "no"),
        ("I see", None),
        ("", None),
    ],
)
def test_mme_reads_the_first_four_characters(reply, said):
    score = build_metric("mme").score(reply, "Yes", {})
    assert (score.extracted or None) == said


def test_mme_totals_worked_by_hand():
    metric = build_metric("mme")
    rows = [("count", "i1", 1), ("count", "i1", 1), ("count", "i2", 1), ("count", "i2", 0), ("code_reasoning", "i3", 1),
            ("code_reasoning", "i3", 1), ("OCR", "i4", 1)]  # fmt: skip
    items = [Scored(str(k), Score(float(v)), "yes", {"category": c, "pair": p}) for k, (c, p, v) in enumerate(rows)]
    totals = metric.aggregate(items)
    assert totals["count/acc"] == 75.0 and totals["count/acc_plus"] == 50.0
    assert totals["cognition"] == 200.0 and totals["perception"] == 125.0 + 100.0 and totals["odd_pairs"] == 1.0
    assert totals["score"] == 425.0


# MMBench, OCRBench, MathVista, ChartQAPro, CharXiv --------------------------------------------------------------------


def test_mmbench_wants_every_order_right():
    metric = build_metric("mmbench_circular")
    rows = [(1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 0), (3, 0, 0)]
    meta = {"options": ["x", "y"]}
    items = [Scored(str(k), Score(float(v)), "A", {**meta, "group": g, "pass": p}) for k, (g, p, v) in enumerate(rows)]
    totals = metric.aggregate(items)
    assert totals["score"] == pytest.approx(100 / 3) and totals["vanilla"] == pytest.approx(200 / 3)
    assert totals["groups"] == 3 and totals["incomplete_groups"] == 1


def test_ocrbench_substring_formula_case_and_full_width():
    assert value("ocrbench", "It says STOP sign", ["stop"]) == 1.0
    assert value("ocrbench", "x ^ 2", ["x^2"], dataset="HME100k") == 1.0
    assert value("ocrbench", "X^2", ["x^2"], dataset="HME100k") == 0.0
    assert value("ocrbench", "ＡＢＣ", ["abc"]) == 0.0
    assert value({"name": "ocrbench", "fold_full_width": True}, "ＡＢＣ", ["abc"]) == 1.0
    with pytest.raises(DataError, match="every reply"):
        value("ocrbench", "x", ["  "])


@pytest.mark.parametrize(
    ("reply", "target", "meta", "right"),
    [
        ("(B)", "cat", {"question_type": "multi_choice", "options": ["dog", "cat"]}, 1.0),
        ("B", "cat", {"question_type": "multi_choice", "options": ["dog", "cat"]}, 1.0),
        ("cta", "cat", {"question_type": "multi_choice", "options": ["doggy", "cat"]}, 1.0),
        ("", "cat", {"question_type": "multi_choice", "options": ["dog", "cat"]}, None),
        ("3.9", "3", {"question_type": "free_form", "answer_type": "integer"}, 1.0),
        ("The answer is 42.", "42", {"question_type": "free_form", "answer_type": "integer"}, 1.0),
        ("1.25", "1.2", {"question_type": "free_form", "answer_type": "float", "precision": 1.0}, 1.0),
        ("1.26", "1.2", {"question_type": "free_form", "answer_type": "float", "precision": 1}, 0.0),
        ("none", "3", {"question_type": "free_form", "answer_type": "integer"}, None),
        ("[1, 2]", "[1, 2]", {"question_type": "free_form", "answer_type": "list"}, 1.0),
        ('The answer is "dog".', "dog", {"question_type": "multi_choice", "options": ["dog", "cat"]}, 1.0),
    ],
)
def test_mathvista(reply, target, meta, right):
    assert value("mathvista", reply, target, **meta) == right


@pytest.mark.parametrize(
    ("prediction", "target", "meta", "expected"),
    [
        ("105", "100", {}, 1.0), ("106", "100", {}, 0.0), ("5%", "5", {}, 1.0),
        ("2011", "2010", {"year": ["YES"]}, 0.0),
        ("2011", "2010", {"year": ["NO"]}, 1.0), ("0", "0", {}, 1.0), ("0.01", "0", {}, 0.0),
        ("Males", "Male", {}, 0.8),
        ("['2016', '2017']", "[2016, 2017]", {"year": ["YES"]}, 1.0), ("[2016, 2017]", "[2016, 2017]", {}, 1.0),
        ("['a']", "['a', 'b']", {}, 0.5), ("['a', 'b', 'c']", "['a', 'b']", {}, 2 / 3),
        ("2011", "2010", {"year": ["YES", "NO"], "question_type": "Conversational"}, 1.0), ("yes.", "Yes", {}, 1.0),
        ("ab", "abcd", {}, 0.0),
    ],
)  # fmt: skip
def test_chartqapro(prediction, target, meta, expected):
    assert value("chartqapro", prediction, ["earlier", target], **meta) == pytest.approx(expected)


def test_chartqapro_exact_types():
    meta = {"question_type": "Fact Checking"}
    assert value("chartqapro", "Truee", ["True"], **meta) == pytest.approx(0.8)
    assert value("chartqapro_exact", "Truee", ["True"], **meta) == 0.0


def test_charxiv_proxy_is_exact_and_says_what_it_is():
    assert "NOT" in METRICS.get("charxiv_proxy").protocol
    assert value("charxiv_proxy", "The Blue line.", "the blue line") == 1.0
    assert value("charxiv_proxy", "0.50", "0.5") == 1.0 and value("charxiv_proxy", "0.51", "0.5") == 0.0


def test_an_empty_aggregate_is_not_a_number():
    for name in ("vqa_evalai", "pope_official", "mme", "mmbench_circular", "vsibench", "ocrbench"):
        assert math.isnan(build_metric(name).aggregate([])["score"])
