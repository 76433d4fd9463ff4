"""What every test leaves behind must not change the next one."""

from __future__ import annotations

import gc
import os
import random
import sys
import zlib
from collections.abc import Iterator
from operator import attrgetter

import pytest

gc.set_threshold(50_000, 20, 20)  # imports are a large part of the time that tests take

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_configure(config: pytest.Config) -> None:
    """Grouped tests share an engine that one worker starts. xdist 3.8 cannot rename the tests of pytest 9.2, its groups then
    have no effect, and every worker would start an engine."""
    slots = {name for kind in pytest.Item.__mro__ for name in getattr(kind, "__slots__", ())}
    if config.getoption("dist", "no") == "loadgroup" and "_nodeid" not in slots:
        raise pytest.UsageError(f"pytest {pytest.__version__}: xdist's groups have no effect; see pyproject.toml")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests run where ``MLLM_NIGHTLY=1`` (``make test-all``); shorter ones beside them prove most of the same."""
    if not os.environ.get("MLLM_NIGHTLY"):
        for item in items:
            if item.get_closest_marker("nightly") is not None:
                item.add_marker(pytest.mark.skip(reason="long: make test-all"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random weights are the same in every run, whichever test came before: else one run in hundreds meets a network that
    is dead or a tolerance that is missed, and the next run does not show it."""
    seed = zlib.crc32(item.nodeid.encode())
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
