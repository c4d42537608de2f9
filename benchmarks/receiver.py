"""What the act cases send to: an HTTP receiver that only counts, and a PostgreSQL for the ledger.

Invariants: a process of its own, so that its work is not the sender's; it ends when the case's folder is gone or the
bench dies; it does nothing but count keys, so the client is what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

_FOUND = "receiver.json"


def start(folder: Path, delay_s: float) -> dict[str, str]:
    """Start receiver and PostgreSQL; return their addresses.

    :param delay_s: how long the receiver takes for each answer.
    """
    command = [sys.executable, "-m", "benchmarks.receiver", str(folder), str(os.getppid()), str(delay_s)]
    with (folder / "receiver.log").open("wb") as log:
        holder = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (folder / _FOUND).exists():
        assert holder.poll() is None and time.monotonic() < deadline, (folder / "receiver.log").read_text()
        time.sleep(0.1)
    return addresses(folder)


def addresses(folder: Path) -> dict[str, str]:
    """Return ``http`` and ``postgresql`` → address."""
    found: dict[str, str] = json.loads((folder / _FOUND).read_text(encoding="utf-8"))
    return found


async def _serve(folder: Path, bench: int, delay_s: float, database: str) -> None:
    from aiohttp import web

    keys: Counter[str] = Counter()

    async def post(request: web.Request) -> web.Response:
        await request.read()
        key = request.headers.get("Idempotency-Key", "")
        keys[key] += 1
        if delay_s:
            await asyncio.sleep(delay_s)
        return web.Response(body=b'{"id": "T-%d"}' % len(keys), status=201, content_type="application/json")

    async def seen(_: web.Request) -> web.Response:
        return web.json_response({"keys": len(keys), "twice": sum(n > 1 for key, n in keys.items() if key)})

    app = web.Application()
    app.router.add_post("/tickets", post)
    app.router.add_get("/seen", seen)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    fresh = folder / f"{_FOUND}.new"
    fresh.write_text(json.dumps({"http": f"http://127.0.0.1:{port}", "postgresql": database}), encoding="utf-8")
    fresh.rename(folder / _FOUND)
    while folder.exists() and Path(f"/proc/{bench}").exists():
        await asyncio.sleep(0.5)
    await runner.cleanup()


def _hold(folder: Path, bench: int, delay_s: float) -> None:
    from tests.servers.postgres import PostgresServer

    with contextlib.closing(PostgresServer()) as postgres:
        asyncio.run(_serve(folder, bench, delay_s, postgres.fresh_url()))


if __name__ == "__main__":
    _hold(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
