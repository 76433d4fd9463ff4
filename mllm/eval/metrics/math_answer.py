"""Is a worked-out mathematical answer equal to the expected one (MathVision, MathVerse without its judge)?"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from mllm.eval.metrics.base import Metric, Score
from mllm.eval.metrics.choosing import choose
from mllm.eval.metrics.letters import option_texts
from mllm.eval.metrics.text import collapse, references

_TAIL = 4_000
_LONGEST = 200  # characters of an expression that is worked out
_SAYS = re.compile(r"(?:answer|result)\s*(?:is|should be|=|:)\s*:?\s*", re.IGNORECASE)
_WORDS_OF_LATEX = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad)|\\(?:text|mathrm|mbox|rm)\s*(?=\{)")
_UNITS = re.compile(
    r"(?<=[\d)}])\s*(?:\^?\{?\\?circ\}?|°|degrees?|units?|(?:square |cubic )?(?:mm|cm|km|dm|m|inch(?:es)?|feet|ft|miles?)"
    r"(?:\^?\{?[23]\}?|[²³])?)\s*$",
    re.IGNORECASE,
)
_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{…}``, braces matched; of one that never closes, what follows."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin + 1 : place]
    return text[begin + 1 :]


def final_answer(reply: str) -> tuple[str, str]:
    """(what a reply gives as its answer, rule): the last box, else what follows the last 'answer is', else the last line."""
    text = reply.rpartition("</think>")[2].strip()[-_TAIL:]
    if (inside := boxed(text)) is not None:
        return inside.strip(), "box"
    if announced := list(_SAYS.finditer(text)):
        rest = text[announced[-1].end() :].strip().split("\n")[0]
        return re.split(r"\.(?:\s|$)", rest)[0].strip(), "answer is"
    return (text.split("\n")[-1].strip() if text else ""), "last line"


def normal(text: str) -> str:
    """An answer without LaTeX's dressing, dollar signs, units, spaces and a leading ``x =``; lower case."""
    text = _WORDS_OF_LATEX.sub("", text.strip().strip("*").strip()).replace("\\$", "").replace("$", "")
    text = text.replace("\\%", "%").replace("dfrac", "frac").replace("tfrac", "frac").rstrip(".,;").strip()
    if re.fullmatch(r"\(?[A-Za-z]\w{0,3}\)?\s*(?:=|\\approx|≈)[^=]+", text):
        text = re.split(r"=|\\approx|≈", text)[1]
    text = _UNITS.sub("", text.strip())
    return re.sub(r"[\s{}]", "", text).lower() if "\\" not in text else re.sub(r"\s", "", text).lower()


def value_of(text: str) -> float | None:
    """The number that an expression comes to: digits, ``+ - * / ^``, fractions, roots, π, percent, in LaTeX or plain text;
    None for anything else."""
    text = text.strip().lower()
    if not text or len(text) > _LONGEST:
        return None
    plain = _plain_arithmetic(text)
    if plain is None or re.search(r"[^\d.+\-*/() epirsqt,]", plain):
        return None
    try:
        number = _evaluate(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, TypeError, MemoryError):
        return None
    return number if math.isfinite(number) else None


def _plain_arithmetic(text: str) -> str | None:
    """LaTeX arithmetic as Python writes it, or None when a command remains that is not read."""
    text = (
        re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text).replace("−", "-").replace("π", "\\pi ").replace("√", "\\sqrt ")
    )
    for _ in range(8):
        before = text
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
        if text == before:
            break
    text = re.sub(r"\\frac(\d)(\d)", r"((\1)/(\2))", text)
    text = re.sub(r"\\sqrt\s*(\d+)", r"sqrt(\1)", text)
    text = re.sub(r"\\(?:cdot|times)", "*", text).replace("×", "*").replace("\\div", "/").replace("\\pi", " pi ")
    text = re.sub(r"\^\{([^{}]*)\}", r"**(\1)", text).replace("^", "**")
    if "\\" in text or "{" in text:
        return None
    text = re.sub(r"(?<=[\d)])\s*(?=\(|sqrt|pi)|(?<=pi)\s*(?=[\d(])", "*", text.replace("%", "*0.01"))
    return " ".join(text.split())


def _evaluate(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.Name) and node.id == "pi":
        return math.pi
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            power = math.pow(left, right)
            return power
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "sqrt"
        and len(node.args) == 1
    ):
        return math.sqrt(_evaluate(node.args[0]))
    raise ValueError("not arithmetic")


def same_answer(wanted: str, given: str) -> tuple[bool, str]:
    """(equal?, which comparison decided): as text, as numbers to two decimals, or part by part where both are lists."""
    left, right = normal(wanted), normal(given)
    if left and left == right:
        return True, "equal text"
    first, second = value_of(left), value_of(right)
    if first is not None and second is not None:
        return round(first, 2) == round(second, 2), "numbers to two decimals"
    outer = [(text[:1], text[-1:]) for text in (left, right)]
    if all(pair in (("(", ")"), ("[", "]")) for pair in outer) and left.count(",") == right.count(",") > 0:
        pairs = zip(left[1:-1].split(","), right[1:-1].split(","))
        return all(same_answer(one, other)[0] for one, other in pairs), "part by part"
    return False, "different"


class MathAnswer(Metric):
    """``meta.options`` makes a choice of it: the letter, or the option's own value, is accepted."""

    name = "math_answer"
    protocol = (
        "a mathematical answer by rule: the last box, else after the last 'answer is', else the last line; a choice by our "
        "letter rule or the option's value; equal as text without LaTeX's dressing and units, or to two decimals (arithmetic, "
        "fractions, roots and π are worked out). Stands in for MathVerse's judge"
    )

    def score(self, prediction: str, target: Any, meta: Mapping[str, Any]) -> Score:
        options, wanted = option_texts(meta), references(target)
        given, how = final_answer(prediction)
        if options:
            accepted = {text.strip().strip("()").upper() for text in wanted}
            accepted |= {
                letter for letter, text in options.items() for each in wanted if collapse(text) == collapse(each)
            }
            letter, rule = choose(given, options) if how != "last line" else choose(prediction, options)
            if letter is not None:
                return Score(float(letter in accepted), letter, f"{how}; {rule}")
            wanted = [*wanted, *(text for letter, text in options.items() if letter in accepted)]
        if not given:
            return Score(None, "", "empty")
        rule = "different"
        for each in wanted:
            right, rule = same_answer(each, given)
            if right:
                return Score(1.0, given, f"{how}; {rule}")
        if options and how == "last line":
            return Score(None, "", "no letter")
        return Score(0.0, given, f"{how}; {rule}")
