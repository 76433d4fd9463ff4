"""How are a prediction file's answers put to a judge, resumably, and what do its verdicts add up to?"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError
from mllm.eval.cache import AnswerCache, cache_key
from mllm.eval.generators.base import Generator
from mllm.eval.judging.prompts import JudgePrompt, Verdict, read_verdict
from mllm.eval.metrics import build_metric
from mllm.eval.predictions import Row, header_path, read_predictions, write_atomic, write_lines
from mllm.eval.progress import Progress
from mllm.eval.report.statistics import Estimate, bootstrap_estimate, mean_estimate
from mllm.types import Request, Response

FOLDER = "judges"
_HOPELESS = 8
"""So many failures after each other, and the judge is taken for unreachable."""


@dataclass
class Judged:
    """Verdicts on one task by one judge. verdicts: id → what is stored of it; unread: rule → how many replies gave no
    verdict (each counts 0); missing: ids that the judge was not reached for, without which there is no score."""

    task: str
    judge: str
    prompt: str
    reads: str
    source: str
    verdicts: dict[str, dict[str, Any]]
    clusters: list[str | None]
    categories: dict[str, str | None]
    missing: list[str] = field(default_factory=list)
    skipped: int = 0
    answered_by: list[str] = field(default_factory=list)
    path: str = ""

    @property
    def unread(self) -> dict[str, int]:
        """Replies without a verdict by why."""
        return dict(Counter(v["rule"] for v in self.verdicts.values() if v["value"] is None))

    @property
    def label(self) -> str:
        """The judge by name and version and its prompt, as stands beside every number of it."""
        exact = [name for name in self.answered_by if name not in self.judge]
        version = f" = {', '.join(exact)}" if exact else ""
        return f"{self.judge}{version} · {self.prompt}"

    def estimate(self) -> Estimate:
        """The score in percent with its 95 % interval; NaN while verdicts are missing. rating: the model's ratings over
        the reference's."""
        if self.missing or not self.verdicts:
            nan = float("nan")
            return Estimate(nan, nan, nan, nan, len(self.verdicts), None, "not judged to the end")
        kept = list(self.verdicts.values())
        names = [cluster if cluster is not None else f"#{k}" for k, cluster in enumerate(self.clusters)]
        if self.reads == "rating":
            model = [v.get("parts", {}).get("model", 0.0) for v in kept]
            reference = [v.get("parts", {}).get("reference", 0.0) for v in kept]

            def ratio(places: Any) -> float:
                total = sum(reference[place] for place in places)
                return 100 * sum(model[place] for place in places) / total if total else float("nan")

            return bootstrap_estimate(ratio, names)
        values = [v["value"] or 0.0 for v in kept]
        result = mean_estimate(values, clusters=names, binary=self.reads in ("binary", "extract"))
        scaled = {name: 100 * getattr(result, name) for name in ("value", "standard_error", "low", "high")}
        return Estimate(**(asdict(result) | scaled))

    def by_category(self) -> dict[str, float]:
        """Mean verdict in percent per category."""
        groups: dict[str, list[float]] = {}
        for name, verdict in self.verdicts.items():
            if (category := self.categories.get(name)) is not None:
                groups.setdefault(category, []).append(verdict["value"] or 0.0)
        return {name: 100 * sum(values) / len(values) for name, values in groups.items()}


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
    rows = [row for row in read_predictions(path) if row["target"] is not None and not row.get("unusable")]
    if not rows:
        raise DataError(f"{path}: no answer with a target, so nothing to judge")
    task = str(_header(path)["identity"]["task"])
    place = Path(folder) if folder is not None else path.parent
    own = AnswerCache(place / FOLDER / "verdicts.sqlite") if cache is None else cache
    result = Judged(task, judge.name, prompt.label, prompt.reads, prompt.source, {}, [], {})
    target = place / FOLDER / f"{task}.{prompt.name}.{_slug(judge.name)}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    sound = [row for row in rows if not row.get("error")]
    result.skipped = len(rows) - len(sound)
    replies = _ask(judge, prompt, sound, own, task, progress)
    if cache is None:
        own.close()
    for row in rows:
        verdict = _verdict(prompt, row, replies)
        if verdict is None:
            result.missing.append(row["id"])
            continue
        result.verdicts[row["id"]] = verdict
        result.clusters.append(row.get("cluster"))
        result.categories[row["id"]] = row.get("category")
    weights = f"fingerprint {hashlib.sha256(judge.fingerprint().encode()).hexdigest()[:8]}"
    result.answered_by = sorted(getattr(judge, "answered_by", {})) or [weights]
    result.path = str(target)
    lines = [
        {"id": name, **verdict, "category": result.categories[name], "cluster": cluster}
        for (name, verdict), cluster in zip(result.verdicts.items(), result.clusters)
    ]
    write_lines(target, lines)
    about = {
        "task": task,
        "judge": result.judge,
        "answered_by": result.answered_by,
        "prompt": prompt.model_dump(mode="json"),
    }
    about |= {"label": result.label, "missing": result.missing, "reads": prompt.reads, "predictions": _digest(rows)}
    write_atomic(target.with_suffix(".about.json"), json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return result


def _ask(
    judge: Generator, prompt: JudgePrompt, rows: Sequence[Row], cache: AnswerCache, task: str, progress: bool
) -> dict[str, Response]:
    """Replies by request id (``id``, and ``id`` with ``#swapped`` where both orders are asked); failed ones left out."""
    fingerprint, replies = judge.fingerprint(), {}
    options = {"max_new_tokens": prompt.max_new_tokens, "do_sample": False}
    ways = (False, True) if prompt.reads == "preference" else (False,)
    open_requests: dict[str, tuple[str, Request]] = {}

    def requests() -> Iterator[Request]:
        for row in rows:
            for swapped in ways:
                name = f"{row['id']}#swapped" if swapped else row["id"]
                request = Request(name, prompt.turns(row, swapped=swapped), [], dict(options))
                key = cache_key(request, [], fingerprint)
                if (known := cache.get(key, request)) is not None:
                    replies[name] = known
                    continue
                open_requests[name] = (key, request)
                yield request

    failures = 0
    with Progress(f"{task} by {judge.name}", len(rows) * len(ways), shown=progress) as bar:
        for response in judge.generate(requests()):
            if response.error is not None:
                failures += 1
                if failures >= _HOPELESS:
                    print(
                        f"{judge.name}: {failures} requests failed one after another, the last with: {response.error}"
                    )
                    break
                continue
            failures = 0
            cache.put(*open_requests.pop(response.id), response)
            replies[response.id] = response
            bar.advance()
    return replies


def _verdict(prompt: JudgePrompt, row: Row, replies: Mapping[str, Response]) -> dict[str, Any] | None:
    """What is stored of one row's verdict; None when the judge was not reached for it."""
    if row.get("error"):
        return {"value": None, "rule": "generation failed", "reply": ""}
    names = [row["id"], f"{row['id']}#swapped"] if prompt.reads == "preference" else [row["id"]]
    if any(name not in replies for name in names):
        return None
    found = [read_verdict(prompt, replies[name].text) for name in names]
    reply = "\n---\n".join(replies[name].text for name in names)
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
        rows = read_predictions(path)
        verdicts = {row["id"]: {key: value for key, value in row.items() if key != "id"} for row in rows}
        prompt = JudgePrompt(**about["prompt"])
        found.append(
            Judged(
                about["task"], about["judge"], prompt.label, prompt.reads, prompt.source, verdicts,
                [row.get("cluster") for row in rows],
                {row["id"]: row.get("category") for row in rows}, about["missing"], 0, about["answered_by"], str(path),
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


def _digest(rows: Sequence[Row]) -> str:
    text = json.dumps([[row["id"], row["output"]] for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
