"""A generator for tests that needs no model: it answers by a rule on the prompt and the pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mllm.types import Request, Response


class RuleGenerator:
    """Answers ``rule(request)``; a rule that raises gives a failed response."""

    def __init__(self, rule: Callable[[Request], str], name: str = "rule"):
        self.rule, self.name, self.asked = rule, name, []

    def fingerprint(self) -> str:
        return self.name

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        for request in requests:
            self.asked.append(request.id)
            prompt = request.turns[-1].content
            try:
                yield Response(request.id, self.rule(request), prompt, len(prompt), 1)
            except ValueError as error:
                yield Response(request.id, "", prompt, error=str(error))


def pixel_rule(request: Request) -> str:
    """A fixed function of prompt and pixels: 0 to 9."""
    digest = hashlib.sha256(request.turns[-1].content.encode())
    for image in request.images:
        digest.update(image.tobytes())
    return str(digest.digest()[0] % 10)


def first_option(request: Request) -> str:
    return "A"


def constant(text: str) -> Any:
    return lambda request: text
