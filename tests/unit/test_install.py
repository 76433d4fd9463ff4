"""Do hints say what installs this very copy?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mllm import install
from mllm.errors import UnavailableError
from mllm.serve.options import check_start

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
    sources = Path(install.__file__).parent.rglob("*.py")
    assert not [p for p in sources if re.search(r"install '?mllm(?!-toolkit)[\[' ]", p.read_text())]


def test_a_library_that_vllms_cpu_build_lacks_is_named_before_its_start(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    lacking = lambda name: (_ for _ in ()).throw(OSError(f"{name}: cannot open shared object file"))  # noqa: E731
    monkeypatch.setattr(install.ctypes, "CDLL", lacking)
    assert "apt-get install libnuma1" in str(install.missing_library())
    monkeypatch.setattr("mllm.serve.options.importlib.util.find_spec", lambda name: object())
    with pytest.raises(UnavailableError, match=r"needs libnuma\.so\.1"):
        check_start("127.0.0.1", None)
    monkeypatch.setattr(install.ctypes, "CDLL", lambda name: None)
    assert install.missing_library() is None
    check_start("127.0.0.1", None)

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(install.ctypes, "CDLL", lacking)
    assert install.missing_library() is None, "vLLM's build for GPUs needs none"


def test_a_start_that_compiles_everything_anew_is_told_with_what_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    told = install.uncompiled()
    assert told is not None and "PYTHONDONTWRITEBYTECODE is set" in told
    folder = told.rpartition(" ")[2]
    assert (Path(folder) / "transformers" / "__init__.py").is_file() and f"{sys.executable} -m compileall" in told
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert install.uncompiled() is None, "the first start keeps it"
    monkeypatch.setattr(install.os, "access", lambda place, kind: False)
    assert f"{tmp_path} cannot be written" in str(install.uncompiled())
    origin = importlib.util.find_spec("transformers").origin
    kept = Path(importlib.util.cache_from_source(origin))
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert install.uncompiled() is None
