"""A small ticket service: what the example pipelines act on, and what the tests count effects in.

Invariants: what is answered with 201 is stored; an ``Idempotency-Key`` stands for one body: the same again gets the
first answer again, another body gets 409; a refusal stores nothing and depends on the body only; DELETE may be
repeated.

    python include/services/tickets.py --port 8099 --db /tmp/tickets.db --refuse-every 7

=========================================  =====================================================================
``POST /tickets``, ``POST /pages``         201 with ``id``; pages: 422 for those that the rules refuse
``GET /tickets``, ``GET /tickets/{id}``    what is there; 410 for what was deleted (the same for pages)
``DELETE /tickets/{id}``                   200, again and again
``GET /effects``                           key → how often something was really done for it: never more than once
``GET /health``                            200
=========================================  =====================================================================
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from aiohttp import web

TABLES = """
CREATE TABLE IF NOT EXISTS thing (
    kind TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    deleted_at TEXT, PRIMARY KEY (kind, id));
CREATE TABLE IF NOT EXISTS answer (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, status INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS effect (
    seq INTEGER PRIMARY KEY, key TEXT NOT NULL, what TEXT NOT NULL, at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
"""
LETTERS = {"tickets": "T", "pages": "P"}


@dataclass(frozen=True)
class Rules:
    """Which pages are refused, by their body alone.

    :param every: about one in so many, chosen by the digest of the subject; 0 refuses none.
    :param when: ``field=value`` pairs; a page with such a field is refused.
    """

    every: int = 0
    when: tuple[str, ...] = ()

    def reason(self, body: dict[str, Any]) -> str:
        """Return why a page is refused, or empty text."""
        for rule in self.when:
            field, _, value = rule.partition("=")
            if str(body.get(field)) == value:
                return f"nobody takes pages with {field} {value}"
        subject = str(body.get("subject", json.dumps(body, sort_keys=True)))
        number = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big")
        return f"nobody is on duty for {subject}" if self.every and number % self.every == 0 else ""


class Desk:
    """Keep tickets and pages in SQLite; each method is one transaction."""

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.executescript(TABLES)

    def known(self, key: str, request: str) -> tuple[int, dict[str, Any]] | None:
        """Return the first answer under a key, or 409 when it was given for another request."""
        row = self._db.execute("SELECT request, status, body FROM answer WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row[0] != request:
            return 409, {"error": "this Idempotency-Key was used for another request"}
        return row[1], json.loads(row[2])

    def add(self, kind: str, body: dict[str, Any], key: str, request: str) -> tuple[int, dict[str, Any]]:
        """Store a ticket or page."""
        with Transaction(self._db):
            count = self._db.execute("SELECT count(*) FROM thing WHERE kind = ?", (kind,)).fetchone()[0]
            name = hashlib.sha256(key.encode()).hexdigest()[:12] if key else str(count + 1)
            thing = {"id": f"{LETTERS[kind]}-{name}", **{k: v for k, v in body.items() if k != "id"}}
            self._db.execute("INSERT INTO thing (kind, id, body) VALUES (?, ?, ?)", (kind, thing["id"], dump(thing)))
            self._keep(key, request, 201, thing, f"create {thing['id']}")
        return 201, thing

    def delete(self, kind: str, name: str, key: str, request: str) -> tuple[int, dict[str, Any]]:
        """Delete a ticket or page; again is as once."""
        found = self.get(kind, name)
        if found[0] == 404:
            return found
        answer = {"id": name, "deleted": True}
        with Transaction(self._db):
            if found[0] == 200:
                now = "UPDATE thing SET deleted_at = CURRENT_TIMESTAMP WHERE kind = ? AND id = ?"
                self._db.execute(now, (kind, name))
            self._keep(key, request, 200, answer, f"delete {name}" if found[0] == 200 else "")
        return 200, answer

    def get(self, kind: str, name: str) -> tuple[int, dict[str, Any]]:
        """Return one ticket or page."""
        query = "SELECT body, deleted_at FROM thing WHERE kind = ? AND id = ?"
        row = self._db.execute(query, (kind, name)).fetchone()
        if row is None:
            return 404, {"error": f"there is no {name} among the {kind}"}
        return (410, {"error": f"{name} was deleted at {row[1]}"}) if row[1] else (200, json.loads(row[0]))

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Return what is there, oldest first."""
        query = "SELECT body FROM thing WHERE kind = ? AND deleted_at IS NULL ORDER BY rowid"
        return [json.loads(body) for (body,) in self._db.execute(query, (kind,))]

    def effects(self) -> dict[str, int]:
        """Return how often something was really done, per key."""
        return dict(self._db.execute("SELECT key, count(*) FROM effect WHERE key != '' GROUP BY key"))

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _keep(self, key: str, request: str, status: int, answer: dict[str, Any], effect: str) -> None:
        if key:
            self._db.execute("INSERT INTO answer VALUES (?, ?, ?, ?)", (key, request, status, dump(answer)))
        if effect:
            self._db.execute("INSERT INTO effect (key, what) VALUES (?, ?)", (key, effect))


class Transaction:
    """Commit, or roll back when something is raised."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("ROLLBACK" if kind else "COMMIT")


@dataclass(frozen=True)
class Service:
    """Answer requests from a desk; nothing is awaited between looking a key up and storing under it."""

    desk: Desk
    rules: Rules
    delay_s: float = 0.0

    async def post(self, request: web.Request) -> web.Response:
        """Store a ticket or page, once per key."""
        kind, key, content = (
            request.match_info["kind"],
            request.headers.get("Idempotency-Key", ""),
            await request.read(),
        )
        await asyncio.sleep(self.delay_s)
        asked = f"POST {kind} {hashlib.sha256(content).hexdigest()}"
        return answer(*(self.desk.known(key, asked) or self._add(kind, key, asked, content)))

    async def delete(self, request: web.Request) -> web.Response:
        """Delete a ticket or page."""
        kind, name, key = (
            request.match_info["kind"],
            request.match_info["id"],
            request.headers.get("Idempotency-Key", ""),
        )
        asked = f"DELETE {kind} {name}"
        return answer(*(self.desk.known(key, asked) or self.desk.delete(kind, name, key, asked)))

    async def get(self, request: web.Request) -> web.Response:
        """Show one."""
        return answer(*self.desk.get(request.match_info["kind"], request.match_info["id"]))

    async def every(self, request: web.Request) -> web.Response:
        """Show all."""
        return answer(200, self.desk.all(request.match_info["kind"]))

    async def effects(self, _: web.Request) -> web.Response:
        """Show how often something was done, per key."""
        return answer(200, self.desk.effects())

    async def health(self, _: web.Request) -> web.Response:
        """Say that the service is up."""
        return answer(200, {"status": "up"})

    def _add(self, kind: str, key: str, asked: str, content: bytes) -> tuple[int, dict[str, Any]]:
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return 400, {"error": "the body is not a JSON object"}
        reason = self.rules.reason(body) if kind == "pages" else ""
        return (422, {"error": reason}) if reason else self.desk.add(kind, body, key, asked)


def make_app(service: Service) -> web.Application:
    """Return the service as an application that closes its desk in the end."""

    async def close(_: web.Application) -> None:
        service.desk.close()

    app = web.Application()
    app.router.add_get("/health", service.health)
    app.router.add_get("/effects", service.effects)
    app.router.add_get("/{kind:tickets|pages}", service.every)
    app.router.add_post("/{kind:tickets|pages}", service.post)
    app.router.add_get("/{kind:tickets|pages}/{id}", service.get)
    app.router.add_delete("/{kind:tickets|pages}/{id}", service.delete)
    app.on_cleanup.append(close)
    return app


def answer(status: int, value: Any) -> web.Response:
    """Return a JSON answer."""
    return web.json_response(value, status=status)


def dump(value: Any) -> str:
    """Return the JSON text that is stored."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="A small ticket service with idempotency keys.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--db", default="tickets.db", help="SQLite file; made if missing")
    parser.add_argument(
        "--refuse-every", type=int, default=0, metavar="N", help="refuse about one page in N, by subject"
    )
    parser.add_argument("--refuse-when", action="append", default=[], metavar="FIELD=VALUE", help="refuse such pages")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="wait before each POST is looked at")
    options = parser.parse_args()
    rules = Rules(options.refuse_every, tuple(options.refuse_when))
    app = make_app(Service(Desk(options.db), rules, options.delay_ms / 1000))
    web.run_app(app, host=options.host, port=options.port, access_log=None)


if __name__ == "__main__":
    main()
