"""What every test leaves behind must not change the next one."""

from __future__ import annotations

import gc
import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import pytest

gc.set_threshold(50_000, 20, 20)  # imports are a large part of the time that tests take

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_configure(config: pytest.Config) -> None:
    """Grouped tests share an engine that one worker starts. xdist 3.8 cannot rename the tests of pytest 9.2, its groups then
    have no effect, and every worker would start an engine."""
    slots = {name for kind in pytest.Item.__mro__ for name in getattr(kind, "__slots__", ())}
    if config.getoption("dist", "no") == "loadgroup" and "_nodeid" not in slots:
        raise pytest.UsageError(f"pytest {pytest.__version__}: xdist's groups have no effect; see pyproject.toml")


@pytest.hookimpl(tryfirst=True)  # xdist writes the groups into the tests' names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests run where ``MLLM_NIGHTLY=1`` (``make test-all``); shorter ones beside them prove most of the same. Tests that share
    what their module has trained, built or started go to one worker: each worker would train, build or start it again."""
    for item in items:
        if not os.environ.get("MLLM_NIGHTLY") and item.get_closest_marker("nightly") is not None:
            item.add_marker(pytest.mark.skip(reason="long: make test-all"))
        if item.get_closest_marker("xdist_group") is None and _shares_with_its_module(item):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))


def _shares_with_its_module(item: pytest.Item) -> bool:
    fixtures = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    return any(fixture.scope == "module" for found in fixtures.values() for fixture in found)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How long each folder's tests ran, all workers together: what has grown is seen before all of it is too slow."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds["/".join(report.nodeid.partition("::")[0].split("/")[:-1])] += report.duration
    if (total := sum(seconds.values())) > 300:
        terminalreporter.write_sep("=", f"{total:.0f} s of tests")
        for folder, its in seconds.most_common():
            terminalreporter.write_line(f"{its:6.0f} s  {folder}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random weights are the same in every run, whichever test came before: else one run in hundreds meets a network that
    is dead or a tolerance that is missed, and the next run does not show it."""
    assert item.parent is not None
    plain = f"{item.parent.nodeid}::{item.name}"  # without the group that xdist adds
    seed = zlib.crc32(plain.encode())
    random.seed(seed)
    for name, function in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if (module := sys.modules.get(name)) is not None:
            attrgetter(function)(module)(seed)


@pytest.fixture(autouse=True)
def no_launcher_variables_left_behind() -> Iterator[None]:
    """accelerate, transformers and DeepSpeed take these for "I am one of several processes" and wait for the others."""
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    yield
    after = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    assert after == before, "a test left launcher variables in the environment"


@pytest.fixture(autouse=True)
def no_plugins_left_behind() -> Iterator[None]:
    """`use_plugins` also speaks to the processes that later tests start."""
    before = os.environ.get("MLLM_PLUGINS")
    yield
    os.environ.pop("MLLM_PLUGINS", None) if before is None else os.environ.update({"MLLM_PLUGINS": before})
