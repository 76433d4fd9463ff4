"""Why does the hub not give a file, and what is to be done?"""

from __future__ import annotations

from typing import Any


def hub_reason(error: BaseException, source: Any) -> str:
    """One sentence on why ``source`` could not be read from the hub, with the cure; the error's first line when it is none of
    the hub's known refusals."""
    if refusal := hub_refusal(error, source):
        return refusal
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def hub_refusal(error: BaseException, source: Any) -> str | None:
    """One sentence on why the hub did not give ``source``, with the cure; None when that is not what went wrong. Looks through
    the chain of causes, since libraries wrap the hub's own errors."""
    from huggingface_hub import errors

    seen: BaseException | None = error
    while seen is not None:
        # The datasets package raises its own error without the hub's behind it.
        text = str(seen) if type(seen).__name__ == "DatasetNotFoundError" else ""
        if isinstance(seen, errors.HFValidationError):  # what the hub could not even look for
            return (
                f"there is no folder {source}, and no repository on the hub has such a name; make it first (a recipe's first lines say "
                "what does) or give its path"
            )
        if isinstance(seen, errors.GatedRepoError) or "is a gated dataset" in text:
            return (
                f"{source} is gated: accept its terms on its page on the hub, then `hf auth login` or set HF_TOKEN to a token that "
                "may read it"
            )
        if isinstance(seen, errors.RepositoryNotFoundError) or "or cannot be accessed" in text:
            return f"the hub has no {source}, or it is private and needs `hf auth login`; check the spelling"
        if isinstance(seen, errors.RevisionNotFoundError) or text.startswith("Revision "):
            return f"{source} has no such revision; leave it out, or name a branch, a tag or a whole commit"
        if isinstance(seen, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return (
                f"{source} is not in the hub's cache and the hub is out of reach (HF_HUB_OFFLINE, network): fetch it once, or "
                "give a path"
            )
        seen = seen.__cause__ or seen.__context__
    return None
