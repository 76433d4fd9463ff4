"""Has this exact question been answered by this exact model before?"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mllm.types import Request, Response


def cache_key(request: Request, image_hashes: Sequence[str], fingerprint: str) -> str:
    """sha256 over prompt, image bytes (their hashes), generation settings and model: everything an answer depends
    on."""
    turns = [[turn.role, turn.content] for turn in request.turns]
    content = [turns, list(image_hashes), request.options, fingerprint]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class AnswerCache:
    """Answers by `cache_key` in one SQLite file that several processes may share. Sampled and failed answers are not
    kept."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, response TEXT NOT NULL)")
        self.hits = 0

    def get(self, key: str, request: Request) -> Response | None:
        """The stored answer under the request's id, or None."""
        if request.options.get("do_sample"):
            return None
        found = self._connection.execute("SELECT response FROM answers WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        self.hits += 1
        return Response(**{**json.loads(found[0]), "id": request.id})

    def put(self, key: str, request: Request, response: Response) -> None:
        """Keep an answer."""
        if response.error is None and not request.options.get("do_sample"):
            text = json.dumps(asdict(response), ensure_ascii=False)
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
