"""The example ticket service as a process of its own: real effects, counted by the receiver.

Invariants: port and database stay the same over kill() and restart(), so what was done stays done.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from tests.servers.process import Server, ServerProcess, free_port

_SCRIPT = Path(__file__).parents[2] / "include" / "services" / "tickets.py"


class TicketService(Server):
    """Start the service on a free port.

    :param options: more command line options, such as ``--refuse-every 7``.
    """

    def __init__(self, *options: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix="tickets-"))
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, str(_SCRIPT), "--port", str(self.port), "--db", str(folder / "tickets.db"), *options]
        super().__init__(
            folder, ServerProcess(command, log=folder / "tickets.out", ready=lambda _: self._answers(), deadline_s=120)
        )

    def get(self, path: str) -> Any:
        """What the service answers to a GET."""
        with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as answer:
            return json.load(answer)

    def effects(self) -> dict[str, int]:
        """How often something was really done, per key."""
        return dict(self.get("/effects"))

    def _answers(self) -> bool:
        try:
            self.get("/health")
        except OSError:
            return False
        return True
