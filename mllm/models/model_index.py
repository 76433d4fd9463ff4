"""How does the hub read scores: the ``model-index`` of a model card?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_index(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The ``model-index`` of ``results.json``: each task's headline with its rule, interval and protocol.

    A part of a benchmark is named as such in the dataset's name. Tasks without a number are left out. Empty when none has one.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    found = []
    for task, result in results["tasks"].items():
        metric, header = result["metrics"][0], result["header"]
        if metric["value"] is None:
            continue
        spec = header.get("task", {})
        source = next((s for s in spec.get("sources", []) if s["name"] == header.get("source")), {})
        part = f" ({result['num_samples']} of {spec.get('size') or '?'} samples)" if header.get("limited") else ""
        found.append(
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=source.get("hub") or task,
                dataset_name=f"{task}{part}",
                dataset_split=source.get("split"),
                dataset_revision=source.get("revision"),
                metric_type=metric["label"].split(" ")[0].split("(")[0],
                metric_value=round(metric["value"], 4),
                metric_name=", ".join(filter(None, (metric["label"], metric.get("unit")))),  # earlier results have no unit
                metric_args={
                    "low": _rounded(metric.get("low")), "high": _rounded(metric.get("high")), "n": metric.get("num_scored"),
                    "unparsed": metric.get("num_unparsed"), "protocol": result.get("protocol"),
                },
            )
        )  # fmt: skip
    return eval_results_to_model_index(name, found) if found else []


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
