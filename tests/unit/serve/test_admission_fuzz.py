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


def test_the_document_names_the_routes_and_fields_that_are_taken(engine):
    """Every route and field that the document has passes, none that would be refused is in it, and ours are there."""
    from mllm.serve.http.fields import DRAW, READ, ROUTES
    from mllm.serve.http.openapi import describe

    document = describe(engine.app.openapi(), name="tiny", draws=True, keys=True)
    paths, schemas = document["paths"], document["components"]["schemas"]
    assert set(ROUTES) <= set(paths) <= set(ROUTES) | set(READ)
    for path in sorted(set(ROUTES) - {DRAW}):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for variant in schema.get("anyOf", [schema]):
            fields = set(schemas[variant["$ref"].rsplit("/", 1)[1]]["properties"])
            assert fields and fields <= ROUTES[path].passed | ROUTES[path].dropped, path
    assert "cfg_scale" in schemas["ImagesRequest"]["properties"]
    assert paths["/health"]["get"]["security"] == [] and paths["/mllm/info"]["get"]["security"] == [{"key": []}]
    text = str(document)
    assert all(f"#/components/schemas/{name}" in text for name in schemas) and "uuid" not in schemas


def test_a_page_of_the_documentation_needs_no_other_host(engine):
    import re

    import httpx

    from mllm.serve.http.admission import Admission, AdmissionSettings
    from mllm.serve.http.keys import Keys

    async def go():
        transport = httpx.ASGITransport(app=Admission(engine.app, AdmissionSettings(), Keys([])))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            page = await client.get("/docs")
            links = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
            return page, links, [(await client.get(link)).status_code for link in links if link != "data:,"]

    page, links, found = asyncio.run(go())
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert len(links) == 3 and not [link for link in links if "//" in link] and found == [200, 200]
