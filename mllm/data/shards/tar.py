"""Which rows does a tar file hold, one after another, and what is damaged in it?"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mllm.data.shards.members import key_and_kind

_READ_AT_ONCE = 1 << 18


@dataclass
class Group:
    """Members of one key. end: byte at which the next group begins; problem: why it is no row."""

    key: str
    end: int = 0
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""


def groups(file: Any, start: int) -> Iterator[Group]:
    """The groups of an open tar file from byte ``start``, where a member's header begins.

    A header that is damaged is passed over, block by block, until one reads again; the groups on both sides of it may lack members and
    are handed out with a ``problem``, as is one with two members of a kind, and the last of a file that is cut short. Reading
    errors of the file itself are raised.
    """
    file.seek(start)
    damaged: list[int] = []

    class Header(tarfile.TarInfo):
        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
            while True:
                try:
                    return super().fromtarfile(tar)
                except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]
                    damaged.append(start + tar.fileobj.tell() - tarfile.BLOCKSIZE)  # type: ignore[union-attr]
                except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
                    raise _CutShortError("ends without the mark that closes a tar file") from error
                except tarfile.TruncatedHeaderError as error:  # type: ignore[attr-defined]
                    raise _CutShortError("ends within a header") from error

    group: Group | None = None
    suspect = ""  # why the group that is being collected may lack members
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=_READ_AT_ONCE, tarinfo=Header) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps the header of every member
                if damaged:
                    problem = f"the tar file is damaged at byte {damaged[0]}; members may be missing"
                    damaged.clear()
                    if group is not None:
                        group.problem = group.problem or problem
                    suspect = problem
                if not member.isfile():
                    continue
                named = key_and_kind(member.name)
                key, kind = named or (member.name, "")
                if group is None or key != group.key:
                    if group is not None:
                        group.end = start + member.offset
                        yield group
                    group = Group(key, problem=suspect)
                suspect = ""
                if named is None:
                    group.problem = f"the member {member.name!r} has no ending that says what it is"
                elif kind in group.members:
                    group.problem = f"two members are named {key}.{kind}"
                else:
                    group.members[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
            if group is not None:
                if damaged:
                    group.problem = group.problem or f"the tar file is damaged at byte {damaged[0]}"
                group.end = -1
                yield group
            elif damaged:
                yield Group("", -1, problem=f"the tar file is damaged at byte {damaged[0]}")
    except (_CutShortError, tarfile.TarError, EOFError) as error:
        empty = isinstance(error.__cause__, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
        if group is None and empty and not damaged:
            return  # an empty shard
        group = group or Group("")
        group.problem, group.end = group.problem or f"the tar file is cut short: {error}", -1
        yield group


class _CutShortError(Exception):
    pass
