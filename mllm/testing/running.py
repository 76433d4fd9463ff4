"""How are a component's checks run, whatever its kind?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def run_checks(checks: Sequence[Callable[..., None]], *case: Any) -> list[str]:
    """Run every check on one case.

    Args:
        checks: functions that assert one property each.
        case: what every one of them is given.

    Returns:
        The checks' names, in order.

    Raises:
        AssertionError: naming the check and what broke.
    """
    for check in checks:
        try:
            check(*case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
    return [check.__name__ for check in checks]
