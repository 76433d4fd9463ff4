"""Do hints say what installs this very copy?"""

from __future__ import annotations

import importlib.metadata
import json
import re
from types import SimpleNamespace

import pytest

from mllm import install

ORIGINS = {
    "editable": ({"url": "file:///home/a%20b/mllm", "dir_info": {"editable": True}}, "install -e '/home/a b/mllm[train]'"),
    "wheel": ({"url": "file:///tmp/mllm_toolkit-0.1.0-py3-none-any.whl"}, "install '/tmp/mllm_toolkit-0.1.0-py3-none-any.whl[train]'"),
    "git": ({"url": "https://host/r.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}, "install 'mllm-toolkit[train] @ git+https://host/r.git@ab12'"),
    "index": (None, "install 'mllm-toolkit[train]'"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(ORIGINS))
def test_an_extra_is_installed_from_where_this_copy_came_from(case, monkeypatch):
    origin, expected = ORIGINS[case]
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    install._source.cache_clear()
    try:
        assert install.install_hint("train").endswith(expected)
    finally:
        install._source.cache_clear()


def test_nobody_is_sent_to_the_other_project_of_that_name():
    from pathlib import Path

    sources = Path(install.__file__).parent.rglob("*.py")
    assert not [p for p in sources if re.search(r"install '?mllm(?!-toolkit)[\[' ]", p.read_text())]
