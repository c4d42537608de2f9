"""Where a model server is, and how it is spoken to, as a value.

Invariants: frozen, checked on creation, cheap to import; it holds no credential: those are headers, given beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from airflow_ai_provider.errors import SpecError

PROTOCOLS = ("oip", "mlflow", "torchserve", "tensorflow")


@dataclass(frozen=True)
class RemoteEndpoint:
    """Name a model on a model server.

    :param protocol: ``oip`` (Open Inference Protocol 2: Triton, KServe, MLServer), ``mlflow`` (``mlflow models
        serve``), ``torchserve``, ``tensorflow`` (TensorFlow Serving's REST).
    :param url: ``http(s)://host[:port][/path]``, without credentials.
    :param model: the model's name on the server; empty takes the registered model's.
    :param version: the server's own number for the pinned version; empty when the server counts as the registry does,
        and only then can the pin be proved.
    :param outputs: names of the outputs to ask for, such as ``("predict_proba",)``; empty takes what the server gives.
    :param timeout_s: seconds one request may take from start to the last byte.
    :param patience_s: seconds in which a request is tried again, with growing pauses.
    :param in_flight: requests at a time.
    :param batch_size: rows per request when the task names none; None derives it from the size of a row.
    :raises SpecError: when one of them cannot be; ``faults`` names all; no retry helps.
    """

    protocol: str
    url: str
    model: str = ""
    version: str = ""
    outputs: tuple[str, ...] = ()
    timeout_s: float = 30.0
    patience_s: float = 120.0
    in_flight: int = 8
    batch_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))
        faults = list(self._faults())
        if faults:
            lines = "; ".join(f"{name} {text}" for name, text in faults)
            raise SpecError(f"this model server cannot be asked: {lines}. Correct its connection.", faults=faults)

    def _faults(self) -> list[tuple[str, str]]:
        faults = []
        if self.protocol not in PROTOCOLS:
            faults.append(("protocol", f"{self.protocol!r} is none of {', '.join(PROTOCOLS)}"))
        if not _is_address(self.url):
            # not shown: it may hold a password
            faults.append(("url", "is not http(s)://host[:port][/path] without user, query or fragment"))
        for name in ("timeout_s", "patience_s", "in_flight", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                faults.append((name, f"{value!r} is not a number above 0"))
        return faults

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "outputs": list(self.outputs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RemoteEndpoint:
        """Read what :meth:`to_dict` wrote, or the fields of a connection: numbers may be texts, empty means default.

        :raises SpecError: when a field is unknown, missing or no number; no retry helps.
        """
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in data.items() if value not in (None, "")}
        faults = [(name, "is no field of a model server") for name in given if name not in known]
        faults += [(name, "is missing") for name in ("protocol", "url") if name not in given]
        for name, kind in (("timeout_s", float), ("patience_s", float), ("in_flight", int), ("batch_size", int)):
            try:
                given |= {name: kind(given[name])} if name in given else {}
            except (TypeError, ValueError):
                faults.append((name, f"{given[name]!r} is no number"))
        if faults:
            lines = "; ".join(f"{name} {text}" for name, text in faults)
            raise SpecError(f"this model server cannot be asked: {lines}. Correct its connection.", faults=faults)
        outputs = given.get("outputs") or ()
        names = outputs.split(",") if isinstance(outputs, str) else outputs
        given["outputs"] = tuple(name for item in names if (name := str(item).strip()))
        return cls(**(given | {name: str(given[name]) for name in ("model", "version") if name in given}))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(
            parts.scheme in ("http", "https")
            and parts.hostname
            and (parts.port is None or parts.port > 0)
            and "@" not in parts.netloc
            and not any(c.isspace() or c in "?#" for c in url)
        )
    except ValueError:
        return False
