"""Schemas by id from a schema registry that speaks Confluent's REST API. Nothing but the standard library is needed.

Invariants: each id is asked for once in a registry's life, also when it is unknown; a whole request ends by its
deadline however slowly the bytes drip (looking the host's name up aside); credentials go to the named host only (no
redirect is followed) and into no message; "not there" is an answer of the registry's own, never a stranger's page.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from airflow_ai_provider.errors import ConnectionConfigError, RegistryUnavailableError

MAX_ANSWER = 8 * 1024 * 1024
"""Bytes of an answer that are read at most."""
MAX_REFERENCES = 100
_SCHEMA_NOT_FOUND = (40401, 40402, 40403)  # subject, version, schema: Confluent's error codes
_LATER = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class RegisteredSchema:
    """One schema as the registry holds it.

    :param id: global id, as in the header of every message.
    :param kind: ``AVRO``, ``PROTOBUF`` or ``JSON``.
    :param text: the schema itself.
    :param references: name → text of the schemas that it imports, each after those it imports itself.
    :param subject: where it is registered, by which people know it; empty when the registry does not say.
    :param version: its version under that subject; 0 when the registry does not say.
    """

    id: int
    kind: str
    text: str
    references: Mapping[str, str]
    subject: str = ""
    version: int = 0

    def __str__(self) -> str:
        named = f" ({self.subject} version {self.version})" if self.subject else ""
        return f"schema {self.id}{named}"

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest says about it."""
        return {"id": self.id, "type": self.kind, "subject": self.subject, "version": self.version}


class Schemas(Protocol):
    """Schemas by id."""

    def schema(self, schema_id: int) -> RegisteredSchema | None:
        """Return a schema, or None when the registry says that there is none of this id.

        :raises RegistryUnavailableError: when it did not say in time; a retry may help.
        """


class SchemaRegistry:
    """Read schemas from a registry, each once.

    :param url: of the API (``https://registry:8081``, ``http://apicurio:8080/apis/ccompat/v7``), without credentials.
    :param headers: sent with every request (``Authorization``).
    :param subject: the subject to name a schema by when it is registered under several (``topic-value``).
    :param timeout_s: seconds that one look-up may take, retries included.
    :raises ConnectionConfigError: when the URL cannot be one; a retry does not help.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        subject: str = "",
        timeout_s: float = 10,
    ) -> None:
        parts = urlsplit(url)
        # the host alone goes into messages: whoever wrote a password into the URL does not find it in a log
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConnectionConfigError(
                f"schema registry: {self.url!r} is not the address of an API. Write http(s)://host:port/path, and "
                "login and password into their own fields.",
                url=self.url,
            )
        self._parts, self._subject, self._timeout_s = parts, subject, timeout_s
        self._headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json", **(headers or {})}
        self._known: dict[int, RegisteredSchema | None] = {}

    def schema(self, schema_id: int) -> RegisteredSchema | None:
        """Return a schema, or None when the registry says that there is none of this id.

        :raises RegistryUnavailableError: no answer in time, or "later"; a retry may help.
        :raises ConnectionConfigError: the registry refuses us, or the address is not one's; a retry does not help.
        """
        if schema_id not in self._known:
            self._known[schema_id] = self._find(schema_id, time.monotonic() + self._timeout_s)
        return self._known[schema_id]

    def probe(self) -> str:
        """Ask for the subjects and return a short sentence; raises what :meth:`schema` raises."""
        count = len(self._ask("/subjects", time.monotonic() + self._timeout_s) or ())
        return f"the registry at {self.url} answers; it has {count} subjects"

    def _find(self, schema_id: int, deadline: float) -> RegisteredSchema | None:
        found = self._ask(f"/schemas/ids/{schema_id}", deadline)
        if found is None:
            return None
        texts: dict[str, str] = {}
        self._add_references(found, texts, deadline)
        named = self._ask(f"/schemas/ids/{schema_id}/versions", deadline) or ()
        places = sorted((str(n["subject"]), int(n["version"])) for n in named)
        own = [place for place in places if place[0] == self._subject]
        subject, version = (own or places or [("", 0)])[0]
        # a registry leaves schemaType out for Avro
        return RegisteredSchema(
            schema_id, found.get("schemaType") or "AVRO", found["schema"], texts, subject=subject, version=version
        )

    def _add_references(self, schema: Mapping[str, Any], texts: dict[str, str], deadline: float) -> None:
        for reference in schema.get("references") or ():
            name = str(reference["name"])
            if name in texts:
                continue
            if len(texts) >= MAX_REFERENCES:
                raise ConnectionConfigError(f"schema registry {self.url}: more than {MAX_REFERENCES} references.")
            texts[name] = ""  # holds the place: a schema that imports itself ends here
            subject = quote(str(reference["subject"]), safe="")
            found = self._ask(f"/subjects/{subject}/versions/{int(reference['version'])}", deadline)
            if found is None:
                del texts[name]
                continue  # reading the schema will miss the name, and say so with the schema's id
            self._add_references(found, texts, deadline)
            del texts[name]
            texts[name] = found["schema"]

    def _ask(self, path: str, deadline: float) -> Any:
        """One answer, parsed; None for "not found" in the registry's own words. Tries again until the deadline."""
        pause_s = 0.1
        while True:
            try:
                status, body = self._send(path, deadline)
            except (OSError, http.client.HTTPException) as error:
                status, body, why = 0, b"", f"{type(error).__name__}: {error}"
            else:
                why = f"it answered {status}"
            if status and status not in _LATER:
                return self._read(path, status, body)
            if time.monotonic() + pause_s >= deadline:
                raise RegistryUnavailableError(
                    f"schema registry {self.url} gave no answer to {path} within {self._timeout_s:g} s ({why}). Is it "
                    "up, and does the connection name it? A retry asks again.",
                    url=self.url,
                )
            time.sleep(pause_s * random.uniform(0.5, 1))  # many tasks must not come back at once
            pause_s = min(pause_s * 2, 2)

    def _read(self, path: str, status: int, body: bytes) -> Any:
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status == 200 and answer is not None:
            return answer
        code = answer.get("error_code") if isinstance(answer, dict) else None
        if status == 404 and code in _SCHEMA_NOT_FOUND:
            return None
        refused = "refuses the login" if status in (401, 403) else "does not answer as a schema registry does"
        raise ConnectionConfigError(
            f"schema registry {self.url} {refused}: {path} gave {status} {_brief(body)}. Correct the connection (the "
            "address includes the API's path, such as /apis/ccompat/v7).",
            url=self.url,
            status=status,
        )

    def _send(self, path: str, deadline: float) -> tuple[int, bytes]:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        host, port = str(self._parts.hostname), self._parts.port
        connection: http.client.HTTPConnection
        if self._parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=left_s, context=ssl.create_default_context())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=left_s)
        # a socket's timeout begins anew with each byte; this ends the request as a whole
        watch = threading.Timer(left_s, _hang_up(connection))
        watch.daemon = True
        watch.start()
        try:
            connection.request("GET", self._parts.path.rstrip("/") + path, headers=self._headers)
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER + 1)
        finally:
            watch.cancel()
            connection.close()
        if len(body) > MAX_ANSWER:
            raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER} bytes")
        if answer.length or time.monotonic() >= deadline:  # read(n) takes a cut answer for a whole one
            raise http.client.HTTPException(f"the answer was cut after {len(body)} bytes")
        return answer.status, body


def _hang_up(connection: http.client.HTTPConnection) -> Callable[[], None]:
    def hang_up() -> None:
        sock = connection.sock  # None while connecting, which the socket's own timeout ends
        with contextlib.suppress(OSError, AttributeError):
            sock.shutdown(2)  # wakes the reading thread, which close() alone does not

    return hang_up


def _brief(body: bytes) -> str:
    text = body[:120].decode(errors="replace").strip()
    return repr(text) if text else "without a word"
