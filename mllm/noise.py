"""What do other libraries print that a user can do nothing about, and when is it shown?

bitsandbytes tells of a kernel that it would like, DeepSpeed of every setting it takes, TRL of what is experimental, vLLM of every step
of its start. ``--verbose``, a common option of all commands, or ``MLLM_VERBOSE=1`` shows it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mllm.errors import MllmError

VERBOSE, _VLLM = "MLLM_VERBOSE", "VLLM_LOGGING_LEVEL"
"""Environment variable, so that processes started by a command are as quiet or loud as it is."""
LEVELS = {"bitsandbytes": logging.ERROR, "DeepSpeed": logging.WARNING, "trl": logging.ERROR}
"""Logger → the least that is worth a user's eye."""


def is_verbose() -> bool:
    """Whether other libraries may say what they like."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def hush() -> None:
    """Keep those loggers quiet in this process; nothing is imported. Does nothing with ``--verbose``."""
    if not is_verbose():
        for name, level in LEVELS.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def quiet_vllm() -> Iterator[None]:
    """Around (or as a decorator of) what imports vLLM and starts an engine: it and its processes log errors alone. A server's log is a file
    and keeps everything. Changes nothing with ``--verbose`` or where ``VLLM_LOGGING_LEVEL`` says otherwise."""
    if is_verbose() or _VLLM in os.environ:
        yield
        return
    os.environ[_VLLM] = "ERROR"
    try:
        yield
    finally:
        os.environ.pop(_VLLM, None)


@contextmanager
def load_report_unless_told() -> Iterator[None]:
    """Around (or as a decorator of) what reads weights by transformers and judges them: its LOAD REPORT is not shown where an error of
    ours says the same in one line. It is shown at the end otherwise, and where the error sends its reader there."""
    logger, held = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        held.append(record)
        return False

    if is_verbose():
        yield
        return
    logger.addFilter(hold)
    try:
        yield
    except MllmError as error:
        if "above report" not in str(error):
            held.clear()
        raise
    finally:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
