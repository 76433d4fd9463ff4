"""How are a prediction file's answers put to a judge, resumably, and what do its verdicts add up to?"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mllm.errors import ConfigError, DataError
from mllm.eval.cache import AnswerCache, cache_key
from mllm.eval.generators.base import Generator
from mllm.eval.ids import ByName
from mllm.eval.judging.prompts import JudgePrompt, Verdict, read_verdict
from mllm.eval.metrics import build_metric
from mllm.eval.metrics.base import Mean
from mllm.eval.predictions import Row, header_path, iterate_predictions, write_atomic, write_lines
from mllm.eval.progress import Progress
from mllm.eval.report.columns import Clusters
from mllm.eval.report.statistics import Estimate, bootstrap_estimate, mean_estimate
from mllm.eval.spool import Names
from mllm.types import Request, Response

FOLDER = "judges"
_HOPELESS, _NAMED = 8, 20
"""So many failures after each other, and the judge is taken for unreachable; so many ids without a verdict are named."""


@dataclass
class Judged:
    """Verdicts on one task by one judge, which lie in ``path``. missing: for how many answers the judge was not reached, without which
    there is no score."""

    task: str
    judge: str
    prompt: str
    reads: str
    source: str
    path: str
    missing: int = 0
    skipped: int = 0
    answered_by: list[str] = field(default_factory=list)

    def verdicts(self) -> Iterator[Row]:
        """What is stored of each verdict, one after another: a million are never in memory."""
        return iterate_predictions(Path(self.path))

    @cached_property
    def sums(self) -> VerdictSums:
        """What they add up to."""
        return VerdictSums(self.verdicts())

    @property
    def num_verdicts(self) -> int:
        """How many there are."""
        return len(self.sums.values)

    @property
    def unread(self) -> dict[str, int]:
        """Replies without a verdict (each counts 0) by why."""
        return dict(self.sums.unread)

    @property
    def label(self) -> str:
        """The judge by name and version and its prompt, as stands beside every number of it."""
        exact = [name for name in self.answered_by if name not in self.judge]
        version = f" = {', '.join(exact)}" if exact else ""
        return f"{self.judge}{version} · {self.prompt}"

    def estimate(self) -> Estimate:
        """The score in percent with its 95 % interval; NaN while verdicts are missing. rating: the model's ratings over
        the reference's."""
        sums = self.sums
        if self.missing or not self.num_verdicts:
            nan = float("nan")
            return Estimate(nan, nan, nan, nan, self.num_verdicts, None, "not judged to the end")
        if self.reads == "rating":
            model, reference = np.frombuffer(sums.model), np.frombuffer(sums.reference)

            def ratio(places: np.ndarray) -> float:
                total = reference[places].sum()
                return float(100 * model[places].sum() / total) if total else float("nan")

            return bootstrap_estimate(ratio, sums.clusters.codes())
        result = mean_estimate(
            np.frombuffer(sums.values), clusters=sums.clusters.codes(), binary=self.reads in ("binary", "extract")
        )
        scaled = {name: 100 * getattr(result, name) for name in ("value", "standard_error", "low", "high")}
        return Estimate(**(asdict(result) | scaled))

    def by_category(self) -> dict[str, float]:
        """Mean verdict in percent per category."""
        return {name: 100 * mean.value for name, mean in self.sums.categories.items()}

    def values(self) -> ByName:
        """Id → verdict, one that could not be read as 0."""
        return ByName((row["id"], row["value"] or 0.0) for row in self.verdicts())


class VerdictSums:
    """Verdicts told one after another. values, model, reference: ``(n,)`` float64, a verdict's own and its two ratings."""

    def __init__(self, verdicts: Iterable[Row]):
        self.values, self.model, self.reference = array("d"), array("d"), array("d")
        self.clusters, self.categories, self.unread = Clusters(), dict[str, Mean](), Counter[str]()
        for row in verdicts:
            value, parts = row["value"], row.get("parts", {})
            self.values.append(value or 0.0)
            self.model.append(parts.get("model", 0.0))
            self.reference.append(parts.get("reference", 0.0))
            self.clusters.append(row)
            if value is None:
                self.unread[row["rule"]] += 1
            if (category := row.get("category")) is not None:
                self.categories.setdefault(category, Mean()).append(value or 0.0)


def judge_predictions(
    path: str | Path,
    judge: Generator,
    prompt: JudgePrompt,
    *,
    cache: AnswerCache | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Judged:
    """Ask ``judge`` for a verdict on every answer of a prediction file.

    Verdicts are cached by content (the whole prompt, the judge, its settings), so the same answer is never paid for
    twice; they are written to ``judges/<task>.<prompt>.<judge>.jsonl`` as they come. A judge that stops answering stops
    the run: what it gave stands, and the same call goes on. Rows without a target or with a failed generation are not
    asked (the latter are wrong). Raises `DataError` for a file that is no prediction file.
    """
    path = Path(path)
    digest, asked, failed = _digest(path)
    if not asked + failed:
        raise DataError(f"{path}: no answer with a target, so nothing to judge")
    task = str(_header(path)["identity"]["task"])
    place = Path(folder) if folder is not None else path.parent
    target = place / FOLDER / f"{task}.{prompt.name}.{_slug(judge.name)}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    result = Judged(task, judge.name, prompt.label, prompt.reads, prompt.source, str(target), skipped=failed)
    own = AnswerCache(place / FOLDER / "verdicts.sqlite") if cache is None else cache
    replies = _Replies(judge, prompt, own)
    try:
        with Progress(f"{task} by {judge.name}", asked * len(replies.ways), shown=progress) as bar:
            replies.ask(_usable(path), bar.advance)
        missing = Names()
        write_lines(target, _verdicts(prompt, _usable(path), replies, missing))
    finally:
        if cache is None:
            own.close()
    result.missing = len(missing)
    weights = f"fingerprint {hashlib.sha256(judge.fingerprint().encode()).hexdigest()[:8]}"
    result.answered_by = sorted(getattr(judge, "answered_by", {})) or [weights]
    about = {
        "task": task,
        "judge": result.judge,
        "answered_by": result.answered_by,
        "prompt": prompt.model_dump(mode="json"),
    }
    about |= {"label": result.label, "missing": len(missing), "first_missing": missing[:_NAMED], "reads": prompt.reads}
    about |= {"predictions": digest}
    write_atomic(target.with_suffix(".about.json"), json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return result


def _usable(path: Path) -> Iterator[Row]:
    """Answers with a target."""
    return (row for row in iterate_predictions(path) if row["target"] is not None and not row.get("unusable"))


class _Replies:
    """What the judge said, by request: it lies in the cache, and a reply is read there when it is asked for."""

    def __init__(self, judge: Generator, prompt: JudgePrompt, cache: AnswerCache):
        self._judge, self._prompt, self._cache = judge, prompt, cache
        self._fingerprint = judge.fingerprint()
        self.ways = (False, True) if prompt.reads == "preference" else (False,)

    def _requests(self, row: Row) -> Iterator[tuple[str, Request]]:
        """(key, request) in each way of asking about one answer."""
        options = {"max_new_tokens": self._prompt.max_new_tokens, "do_sample": False}
        for swapped in self.ways:
            name = f"{row['id']}#swapped" if swapped else row["id"]
            request = Request(name, self._prompt.turns(row, swapped=swapped), [], dict(options))
            yield cache_key(request, [], self._fingerprint), request

    def ask(self, rows: Iterable[Row], done: Callable[[], None]) -> None:
        """Put to the judge what it was not asked yet. done: called for every reply that is there."""
        waiting: dict[str, tuple[str, Request]] = {}

        def requests() -> Iterator[Request]:
            for row in rows:
                for key, request in self._requests(row) if not row.get("error") else ():
                    if self._cache.get(key, request) is not None:
                        done()
                        continue
                    waiting[request.id] = key, request
                    yield request

        failures = 0
        for response in self._judge.generate(requests()):
            key, request = waiting.pop(response.id)
            if response.error is None:
                failures = 0
                self._cache.put(key, request, response)
                done()
                continue
            failures += 1
            if failures >= _HOPELESS:
                told = f"{failures} requests failed one after another, the last with: {response.error}"
                print(f"{self._judge.name}: {told}")
                return

    def of(self, row: Row) -> list[Response]:
        """The replies about one answer, in each way of asking; fewer where the judge was not reached."""
        found = (self._cache.get(key, request) for key, request in self._requests(row))
        return [reply for reply in found if reply is not None]


def _verdicts(prompt: JudgePrompt, rows: Iterable[Row], replies: _Replies, missing: Names) -> Iterator[Row]:
    """Lines to store. missing: gets the ids that the judge was not reached for."""
    for row in rows:
        verdict = _verdict(prompt, row, replies)
        if verdict is None:
            missing.append(row["id"])
        else:
            yield {"id": row["id"], **verdict, "category": row.get("category"), "cluster": row.get("cluster")}


def _verdict(prompt: JudgePrompt, row: Row, replies: _Replies) -> dict[str, Any] | None:
    """What is stored of one row's verdict; None when the judge was not reached for it."""
    if row.get("error"):
        return {"value": None, "rule": "generation failed", "reply": ""}
    given = replies.of(row)
    if len(given) < len(replies.ways):
        return None
    found = [read_verdict(prompt, reply.text) for reply in given]
    reply = "\n---\n".join(reply.text for reply in given)
    verdict = found[0]
    if prompt.reads == "preference":
        verdict = _both_orders(*found)
    elif prompt.metric is not None and verdict.value is not None:
        score = build_metric(prompt.metric).score(verdict.extracted, row["target"], row["meta"])
        verdict = Verdict(score.value or 0.0, f"extracted; {score.rule}", extracted=verdict.extracted)
    stored: dict[str, Any] = {"value": verdict.value, "rule": verdict.rule, "reply": reply}
    if verdict.parts:
        stored["parts"] = dict(verdict.parts)
    return stored | ({"extracted": verdict.extracted} if verdict.extracted else {})


def _both_orders(first: Verdict, second: Verdict) -> Verdict:
    """The mean over both orders of showing the two answers, positive where the model's is better."""
    if first.value is None or second.value is None:
        return first if first.value is None else second
    forth, back = first.value, -second.value
    rule = "both orders agree" if (forth > 0) == (back > 0) and (forth < 0) == (back < 0) else "the order decides"
    return Verdict((forth + back) / 2, rule, {"forth": forth, "back": back})


def stored_verdicts(folder: str | Path) -> list[Judged]:
    """Every judge's verdicts in a run's folder."""
    found = []
    for about_path in sorted((Path(folder) / FOLDER).glob("*.about.json")):
        about = json.loads(about_path.read_text(encoding="utf-8"))
        path = about_path.with_name(about_path.name.replace(".about.json", ".jsonl"))
        prompt, missing = JudgePrompt(**about["prompt"]), about["missing"]
        missing = missing if isinstance(missing, int) else len(missing)  # before, every id was listed
        found.append(
            Judged(
                about["task"], about["judge"], prompt.label, prompt.reads, prompt.source, str(path), missing, 0,
                about["answered_by"],
            )
        )  # fmt: skip
    return found


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(header_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{header_path(path)}: needed beside {path.name}, cannot be read ({error})") from None
    if "identity" not in header:
        raise ConfigError(f"{path} is no prediction file of `mllm eval run`")
    return header


def _slug(name: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _digest(path: Path) -> tuple[str, int, int]:
    """(a hash of ids and answers, how many are put to the judge, how many failed)."""
    digest, asked, failed = hashlib.sha256(b"["), 0, 0
    for row in _usable(path):
        comma = ", " if asked + failed else ""
        digest.update((comma + json.dumps([row["id"], row["output"]], ensure_ascii=False)).encode())
        asked, failed = asked + (not row.get("error")), failed + bool(row.get("error"))
    digest.update(b"]")
    return digest.hexdigest()[:12], asked, failed
