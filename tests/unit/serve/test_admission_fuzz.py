"""Does vLLM read in a request what the admission saw in it? The short form of ``benchmarks/admission_fuzz.py``."""

from __future__ import annotations

import asyncio

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("vllm")
    import logging

    from benchmarks.admission_fuzz import Engine

    level = logging.root.level
    try:
        yield Engine()
    except (ImportError, AttributeError) as error:
        pytest.skip(f"another vLLM inside: {error}")
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(level)  # building vLLM's application raises it


def test_vllm_reads_what_was_admitted(engine):
    from benchmarks.admission_fuzz import fuzz

    result = asyncio.run(fuzz(400, seed=1, engine=engine))
    assert result["differing"] == [] and result["read_by_vllm"] > 80, result


@pytest.mark.parametrize("leak", ["parts", "fields", "pictures"])
def test_the_fuzz_finds_a_leak(engine, monkeypatch, leak):
    from benchmarks.admission_fuzz import fuzz
    from mllm.serve.http import admission, content

    if leak == "parts":
        monkeypatch.setattr(content.Content, "_part", lambda self, part: part)
    elif leak == "fields":
        monkeypatch.setattr(admission, "admitted_fields", lambda path, data: dict(data))
    else:
        monkeypatch.setattr(admission, "write_pictures", lambda pictures, rules, secret: None)
    result = asyncio.run(fuzz(150, seed=2, engine=engine))
    assert result["differing"]
