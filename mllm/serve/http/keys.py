"""Who asks? API keys of clients and of the operator."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable, Mapping

from mllm.serve.http.errors import Refused

CLIENTS, OPERATOR = "MLLM_API_KEY", "MLLM_ADMIN_KEY"
"""Environment variables: the clients' keys (several by comma), and the key of the operator's routes."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_MISSING = "the API key is missing or wrong (header Authorization: Bearer <key>, or x-api-key: <key>)"


def client_keys(text: str | None) -> list[str]:
    """The keys of ``MLLM_API_KEY``."""
    return [key for key in re.split(r"[,\s]+", text or "") if key]


class Keys:
    """clients: keys of clients; empty: everybody is one. operator: the key of the routes that change the server."""

    def __init__(self, clients: Iterable[str], operator: str | None = None):
        self.clients, self.operator = list(clients), operator

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """The keys that were given to this server."""
        return cls(client_keys(environment.get(CLIENTS)), environment.get(OPERATOR) or None)

    def owner(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Whose request it is: ``""`` without keys, ``"operator"``, or the client's number. Raises `Refused`."""
        given = list(_given(headers))
        if self.operator and any(_same(key, self.operator) for key in given):
            return "operator"
        if not self.clients:
            return ""
        for number, key in enumerate(self.clients):
            if any(_same(one, key) for one in given):
                return str(number)
        raise Refused(401, _MISSING)

    def check_operator(self, owner: str, what: str) -> None:
        """Raise `Refused` unless the operator asks."""
        if owner == "operator":
            return
        if self.operator is None:
            raise Refused(404, f"{what} is not served (the engine's own routes need a key in {OPERATOR} at the start)")
        raise Refused(404, f"{what} is not served, or to the operator only")


def check_host(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise `Refused` for a request to another name than this machine's own."""
    hosts = [value.decode("latin-1") for name, value in headers if name.lower() == b"host"]
    for host in hosts:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name.lower() not in LOOPBACK:
            raise Refused(403, f"a server without a key answers to localhost only; set {CLIENTS} to serve other names")


def _given(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        if name.lower() == b"x-api-key":
            yield value.strip()
        elif name.lower() == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                yield key.strip()


def _same(given: bytes, key: str) -> bool:
    return hmac.compare_digest(given, key.encode())
