"""A TCP proxy that breaks connections on purpose: late, cut, half-written, refused, silent.

Invariants: it forwards bytes unchanged and in order until it is told to break something; a cut is a reset (RST), as a
crashed peer sends it, not a polite end. Directions are named from the client: "request" to the server, "answer" back.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Literal

Direction = Literal["request", "answer"]
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class TcpProxy:
    """Listen on a free port of 127.0.0.1 and forward each connection to one server.

    :param host: of the real server.
    :param port: of the real server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._delay_s: dict[Direction, float] = {"request": 0.0, "answer": 0.0}
        self._left: dict[Direction, int | None] = {"request": None, "answer": None}
        self._swallowed: set[Direction] = set()
        self.heard: list[bytes] = []
        """How each piece that clients sent begins, in order of arrival."""
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._listener = self._listen(0)
        self.host, self.port = self._listener.getsockname()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def delay(self, seconds: float, direction: Direction = "answer") -> None:
        """Hold every piece of this direction back for so long; 0 ends it."""
        self._delay_s[direction] = seconds

    def cut(self) -> None:
        """Reset every live connection; new ones are accepted."""
        with self._lock:
            live, self._live = self._live, set()
        for connection in live:
            _reset(connection)

    def cut_after(self, byte_count: int, direction: Direction = "answer") -> None:
        """Forward exactly so many more bytes of this direction, then reset everything once: a half-written message."""
        with self._lock:
            self._left[direction] = byte_count

    def swallow(self, direction: Direction = "answer") -> None:
        """Let the bytes of this direction vanish while connections stay open; heal() ends it."""
        self._swallowed.add(direction)

    def refuse(self) -> None:
        """Close the port: live connections are reset and new ones refused, until heal()."""
        self._close_listener()
        self.cut()

    def heal(self) -> None:
        """Forward again as if nothing had been."""
        self._delay_s = {"request": 0.0, "answer": 0.0}
        with self._lock:
            self._left = {"request": None, "answer": None}
        self._swallowed.clear()
        if self._listener.fileno() == -1:
            self._listener = self._listen(self.port)

    def close(self) -> None:
        self._close_listener()
        self.cut()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), reuse_port=False)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread, which close() alone does not
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, timeout=30)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._live |= {client, server}
            for source, sink, direction in ((client, server, "request"), (server, client, "answer")):
                threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        with contextlib.suppress(OSError):  # the other pump or a cut closed the pair
            while piece := source.recv(65536):
                time.sleep(self._delay_s[direction])
                if direction == "request":
                    self.heard.append(piece[:200])
                if direction in self._swallowed:
                    continue
                allowed, last = self._allow(len(piece), direction)
                sink.sendall(piece[:allowed])
                if last:
                    _wait_until_read(sink)  # a reset overtakes bytes that the receiver has not read yet
                    self.cut()
                    return
            with self._lock:  # a cut wakes this pump too: a polite end must not overtake its reset
                if sink in self._live:
                    sink.shutdown(socket.SHUT_WR)

    def _allow(self, size: int, direction: Direction) -> tuple[int, bool]:
        """How many bytes of this piece may pass, and whether they are the last before the cut."""
        with self._lock:
            left = self._left[direction]
            if left is None:
                return size, False
            if size < left:
                self._left[direction] = left - size
                return size, False
            self._left[direction] = None
            return left, True


def _wait_until_read(sink: socket.socket) -> None:
    """Return when the process at the other end has taken all that was sent; it may never: then after 10 s."""
    ours, theirs = (_in_proc(name) for name in (sink.getsockname(), sink.getpeername()))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        waiting = [line[4] for line in lines if line[1:3] in ([ours, theirs], [theirs, ours])]
        if set(waiting) <= {"00000000:00000000"}:  # bytes to send, bytes to read
            return
        time.sleep(0.005)


def _in_proc(name: tuple[str, int]) -> str:
    address = int.from_bytes(socket.inet_aton(name[0]), sys.byteorder)
    return f"{address:08X}:{name[1]:04X}"


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)  # wakes the pump that still reads from it
    connection.close()
