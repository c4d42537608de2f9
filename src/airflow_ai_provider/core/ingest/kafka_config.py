"""Client settings: those that read fast, which a connection may change, and those that read right, which it may not.

Invariants: nothing is committed by itself, nothing is jumped over, aborted records stay hidden, no topic is created.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from airflow_ai_provider.errors import AiProviderError, ConnectionConfigError, SourceUnavailableError

log = logging.getLogger(__name__)

# fetch.queue.backoff.ms (default 1000) is the one that matters: 2.6 times
_FAST: dict[str, Any] = {
    "fetch.queue.backoff.ms": 1,
    "fetch.wait.max.ms": 50,
    # what waits in the client: enough to answer the next call, and no more, for it is memory beside the block's; each
    # of the two consumers that may be at work asks for more below both bounds, and is at most one answer above them
    "queued.min.messages": 50_000,
    "queued.max.messages.kbytes": 16_384,
    "max.partition.fetch.bytes": 4_194_304,
    "fetch.max.bytes": 52_428_800,
}
# a client asks for its first connection only when half of this has passed (default 100)
_SOON: dict[str, Any] = {"reconnect.backoff.ms": 20}
_SAFE: dict[str, Any] = {
    "auto.offset.reset": "error",  # every other setting jumps over deleted records without a word
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "allow.auto.create.topics": False,
}


def consumer_config(config: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return a consumer's settings for a connection's."""
    return {**_FAST, **_SOON, **config, **_SAFE, "group.id": group}


def admin_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an admin client's settings: a connection's without those that only a consumer has."""
    consumer_only = {*_FAST, *_SAFE, "group.id", "group.instance.id", "session.timeout.ms"}
    return {**_SOON, **{name: value for name, value in config.items() if name not in consumer_only}}


class Told:
    """What clients said about their connection, for the error that follows: calls say only "no answer".

    Each thing is said once in the log: a client tries several times a second, and would bury the error under what it
    says each time. A refusal (login, certificate) stays whatever is said after it: a retry does not help against one.
    A client takes it as its logger, too.
    """

    _REFUSALS = ("_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED", "_SSL")
    _TIMES = re.compile(r"\(after \d+ms.*|, \d+ identical error.*")

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._said: set[str] = set()
        self._text = ""
        self.is_refused = False

    def heard(self, error: Any) -> None:
        """Take one error, as a client's ``error_cb``: a ``KafkaError``."""
        name, text = error.name(), error.str()
        self._say(logging.WARNING, text)
        if self.is_refused or name == "_ALL_BROKERS_DOWN":  # which follows every other one
            return
        self._text, self.is_refused = text, name in self._REFUSALS

    def log(self, level: int, form: str, *values: object) -> None:
        """Take a line of a client's own log: what failed comes as an error as well."""
        if values[:1] not in (("FAIL",), ("ERROR",)):
            self._say(level, form % values)

    def _say(self, level: int, text: str) -> None:
        what = self._TIMES.sub("", text)
        if what not in self._said:
            self._said.add(what)
            log.log(level, "Kafka client at %s: %s", self._bootstrap, text)

    def error(self, what: str, fault: object) -> AiProviderError:
        """Return the error of a question that got no answer."""
        if self.is_refused:
            return ConnectionConfigError(
                f"Kafka at {self._bootstrap} does not let us in: {self._text}. Correct security.protocol, "
                "sasl.mechanism, sasl.username, sasl.password or the ssl.… settings in the extra of the kafka "
                "connection; a retry does not help.",
                bootstrap=self._bootstrap,
            )
        why = f" ({self._text})" if self._text else ""
        return SourceUnavailableError(
            f"Kafka at {self._bootstrap} did not answer when {what}: {fault}{why}. Check that the broker runs and the "
            "connection's bootstrap.servers and security.protocol are right; the retry asks again.",
            bootstrap=self._bootstrap,
        )
