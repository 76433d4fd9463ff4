"""Who asks? API keys of clients and of the operator."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from mllm.config import StrictModel, validate
from mllm.errors import ConfigError
from mllm.serve.http.errors import Refused

CLIENTS, OPERATOR, FILE = "MLLM_API_KEY", "MLLM_ADMIN_KEY", "MLLM_KEYS_FILE"
"""Environment variables: the clients' keys (several by comma), the key of the operator's routes, and the file of `read_clients`."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_MISSING = "the API key is missing or wrong (header Authorization: Bearer <key>, or x-api-key: <key>)"


def client_keys(text: str | None) -> list[str]:
    """The keys of ``MLLM_API_KEY``."""
    return [key for key in re.split(r"[,\s]+", text or "") if key]


class Client(StrictModel):
    """A client with a key of its own, and what it may use in a minute (None: no limit)."""

    key: str
    requests: int | None = Field(default=None, gt=0)
    pictures: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    """Of prompts and answers; a picture counts as many as it has in the prompt."""


def read_clients(path: Path | str) -> dict[str, Client]:
    """Name → client, of a YAML file ``name: {key: …, requests: 60, pictures: 120, tokens: 100000}``. Raises `ConfigError`."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--keys {path}: cannot be read ({str(error).splitlines()[0][:200]})") from None
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"--keys {path}: expected a line for each client, NAME: {{key: …, requests: 60}}")
    for name, settings in data.items():  # here, since the general errors show the value
        key = settings.get("key") if isinstance(settings, dict) else None
        if not isinstance(key, str) or len(key) < 8:
            raise ConfigError(f"--keys {path}: {name}: key must be a text of 8 characters or more (write it in quotes)")
    clients = {str(name): validate(Client, settings, where=f"{path}: {name}") for name, settings in data.items()}
    for name, client in clients.items():
        if name == "operator" or not re.fullmatch(r"[A-Za-z0-9._\-]{1,64}", name) or name.isdigit():
            raise ConfigError(f"--keys {path}: {name!r} cannot be a client's name; take letters, such as team-a")
        twice = [other for other in clients if other < name and clients[other].key == client.key]
        if twice:
            raise ConfigError(f"--keys {path}: {twice[0]} and {name} have the same key")
    return clients


class Keys:
    """clients: keys of clients; named: clients with a name and limits; neither: everybody is a client. operator: the key of the
    routes that change the server."""

    def __init__(self, clients: Iterable[str], operator: str | None = None, named: Mapping[str, Client] | None = None):
        self.clients, self.operator, self.named = list(clients), operator, dict(named or {})

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Keys:
        """The keys that were given to this server."""
        file = environment.get(FILE)
        clients, operator = client_keys(environment.get(CLIENTS)), environment.get(OPERATOR) or None
        return cls(clients, operator, read_clients(file) if file else None)

    @property
    def several(self) -> bool:
        """Whether there is more than one client, whose caches are kept apart."""
        return len(self.clients) + len(self.named) > 1

    def owner(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Whose request it is: ``""`` without keys, ``"operator"``, the client's name, or its number. Raises `Refused`."""
        given = list(_given(headers))
        if self.operator and any(_same(key, self.operator) for key in given):
            return "operator"
        if not self.clients and not self.named:
            return ""
        for name, client in self.named.items():
            if any(_same(one, client.key) for one in given):
                return name
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
