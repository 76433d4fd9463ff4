"""Does a reply decline to answer?"""

from __future__ import annotations

import re

_REFUSES = re.compile(
    r"\b(?:i (?:can ?not|can['’]t|am unable|am not able|won['’]t)|i['’]m (?:sorry|unable|not able)|i am sorry|as an ai\b|"
    r"cannot (?:assist|help|comply)|unable to (?:assist|help|comply|answer))",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether a reply begins by declining to answer."""
    return _REFUSES.search(text.lstrip()[:200]) is not None
