"""Does a generator keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from mllm.errors import ConfigError
from mllm.eval.generators import GENERATORS, GeneratorSettings
from mllm.testing.running import run_checks
from mllm.types import IMAGE_MARK, Request, Response, Turn

_OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def sample_requests(count: int = 5) -> list[Request]:
    """Questions with 0, 1 and 2 pictures in turn."""
    requests = []
    for number in range(count):
        images = [Image.new("RGB", (40 + k, 30), (60 * k, 90, 120)) for k in range(number % 3)]
        turns = [Turn("user", (IMAGE_MARK + "\n") * len(images) + f"What is shown? ({number})")]
        requests.append(Request(f"q{number}", turns, images, dict(_OPTIONS)))
    return requests


def check_words(generator: Any) -> None:
    """It has a name, and a fingerprint that stays."""
    assert isinstance(generator.name, str) and generator.name, f"name is {generator.name!r}"
    one, two = generator.fingerprint(), generator.fingerprint()
    assert isinstance(one, str) and one, f"fingerprint gives {one!r}; answers could not be kept apart"
    assert one == two, f"the fingerprint changes from call to call: {one}, {two}"


def check_every_request_once(generator: Any) -> None:
    """Each request gets one `Response` under its id, whatever the order."""
    requests = sample_requests()
    found = list(generator.generate(iter(requests)))
    assert all(isinstance(item, Response) for item in found), (
        f"generate gives {type(found[0]).__name__}, expected Response"
    )
    assert sorted(r.id for r in found) == [r.id for r in requests], (
        f"ids {[r.id for r in found]} for {[r.id for r in requests]}"
    )
    bad = [item for item in found if item.error is None and not isinstance(item.text, str)]
    assert not bad, f"request {bad[0].id}: text is {type(bad[0].text).__name__}" if bad else ""
    failed = [item for item in found if item.error is not None]
    assert not failed, f"request {failed[0].id} is not answered: {failed[0].error}" if failed else ""
    assert list(generator.generate(iter(()))) == [], "no requests give answers"


def check_greedy_answers_repeat(generator: Any) -> None:
    """Asked again, and asked alone, a greedy answer is the same."""
    requests = sample_requests()
    first = {r.id: r.text for r in generator.generate(iter(requests))}
    for request in requests:
        (alone,) = generator.generate(iter([request]))
        assert alone.text == first[request.id], (
            f"{request.id}: {first[request.id]!r} among others, {alone.text!r} alone"
        )


def check_bad_request(generator: Any) -> None:
    """A request that cannot be answered (a mark without its picture) says so in its response; the others are answered."""
    requests = sample_requests(3)
    requests.insert(1, Request("bad", [Turn("user", IMAGE_MARK + "What is shown?")], [], dict(_OPTIONS)))
    found = {r.id: r for r in generator.generate(iter(requests))}
    assert set(found) == {r.id for r in requests}, f"answered {sorted(found)} of {sorted(r.id for r in requests)}"
    assert found["bad"].error, "a mark without a picture is answered as if all were well"
    wrong = [r.id for r in requests if r.id != "bad" and found[r.id].error]
    assert not wrong, f"one bad request makes {wrong} fail too"


def check_reads_as_it_goes(generator: Any) -> None:
    """Requests are taken one after the other from an iterator: a benchmark's pictures are never all in memory."""

    def requests() -> Iterator[Request]:
        yield from sample_requests(2)

    assert len(list(generator.generate(requests()))) == 2, "an iterator of requests is not answered"


CHECKS: tuple[Callable[[Any], None], ...] = (
    check_words,
    check_every_request_once,
    check_greedy_answers_repeat,
    check_bad_request,
    check_reads_as_it_goes,
)


def check_generator(name: str, checkpoint: str | None = None) -> list[str]:
    """Run every check on the generator registered under ``name``: opened on ``checkpoint``, else its class method ``tiny()``.

    Returns the checks' names. Raises `AssertionError` naming the check and what broke, `UnknownName`, or `ConfigError` when
    there is nothing to open.
    """
    cls: Any = GENERATORS.get(name)
    assert hasattr(cls, "open"), f"{cls.__name__} has no class method open(checkpoint, settings)"
    if checkpoint is not None:
        generator = cls.open(checkpoint, GeneratorSettings(batch_size=2))
    elif hasattr(cls, "tiny"):
        generator = cls.tiny()
    else:
        raise ConfigError(
            f"generator {name!r}: name a checkpoint to ask with --checkpoint (or give the class a method tiny())"
        )
    return run_checks(CHECKS, generator)
