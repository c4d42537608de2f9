"""The value that says how a batch is predicted: where the model runs and how rows are given to it.

Invariants: frozen, comparable, with a digest; a value that exists can be run (all faults are raised on creation);
importing this module loads no table library. What is predicted (batch, model) and what is allowed (device, failed
rows) is said elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from airflow_ai_provider.core.batch import digest_of
from airflow_ai_provider.core.infer.tuning import Tuning
from airflow_ai_provider.errors import SpecError

Faults = list[tuple[str, str]]
ENGINES = ("local", "ray", "spark")


@dataclass(frozen=True)
class Runner:
    """Say how a batch is predicted.

    Example: ``Runner(batch_size=256)``, or ``Runner(endpoint="triton")`` for a model server. Written as a mapping with
    the same keys, its values may be templates.

    :param batch_size: rows (of sequences: tokens) per call of the model, at least 1; None finds it.
    :param endpoint: connection of a model server that predicts instead of this worker; None predicts here.
    :param engine: where processes predict: ``local`` on this worker, ``ray`` or ``spark`` on a cluster.
    :param cluster: address of the cluster: Ray's (``auto``, ``ray://head:10001``) or Spark's master
        (``spark://head:7077``, ``sc://head``); None starts one on this worker.
    :param workers: how many of the cluster's tasks run at once; None: as many as it has room for.
    :param precision: ``bfloat16`` or ``float16`` for the heavy operations; None keeps the model's own.
    :param compile: compile the model for the device before the first row.
    :raises SpecError: on creation, with every fault; a retry does not help.
    """

    batch_size: int | None = None
    endpoint: str | None = None
    engine: str = "local"
    cluster: str | None = None
    workers: int | None = None
    precision: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        faults: Faults = []
        if self.batch_size is not None and not _is_count(self.batch_size):
            faults.append(
                ("batch_size", f"{self.batch_size!r} is not a number of rows. Give 1 or more, or leave it out")
            )
        if self.endpoint is not None and not _is_text(self.endpoint):
            faults.append(("endpoint", f"{self.endpoint!r} names no connection. Give its id, or leave it out"))
        _raise(faults + _cluster_faults(self) + _tuning_faults(self))

    @property
    def tuning(self) -> Tuning:
        """What the model may do to be faster."""
        return Tuning(self.precision, self.compile)

    @property
    def digest(self) -> str:
        """SHA-256 of the value."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Runner:
        """Read what :meth:`to_dict` wrote; numbers may be text and what is left out empty, as templates render them.

        :raises SpecError: on unknown keys, or when it cannot be run; a retry does not help.
        """
        if not isinstance(data, Mapping):
            _raise([("", f"{data!r} is not a mapping with {', '.join(FIELDS)}")])
        _raise(
            [(str(key), f"is not a key of a runner; it has {', '.join(FIELDS)}") for key in data if key not in FIELDS]
        )
        return cls(**{name: _read(name, value) for name, value in data.items() if value not in (None, "", "None")})


FIELDS = tuple(field.name for field in fields(Runner))
_NUMBERS = ("batch_size", "workers")


def _read(name: str, value: Any) -> Any:
    if name in _NUMBERS and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return value  # the runner names it as a fault, with the others
    if name == "compile" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    return value


def _tuning_faults(runner: Runner) -> Faults:
    faults = runner.tuning.faults
    if not faults and runner.endpoint is not None:
        given = [name for name in ("precision", "compile") if getattr(runner, name)]
        faults = [
            (name, "is for a model that is opened here; the model server has settings of its own") for name in given
        ]
    return faults


def _cluster_faults(runner: Runner) -> Faults:
    if runner.engine not in ENGINES:
        return [("engine", f"{runner.engine!r} is none of {', '.join(ENGINES)}")]
    faults: Faults = []
    if runner.cluster is not None and not _is_text(runner.cluster):
        faults.append(("cluster", f"{runner.cluster!r} is no address. Give one, or leave it out"))
    elif runner.cluster is not None and "token=" in runner.cluster:
        told = "holds a token, which plan and UI would show; set SPARK_CONNECT_AUTHENTICATE_TOKEN on the worker instead"
        faults.append(("cluster", told))
    if runner.workers is not None and not _is_count(runner.workers):
        faults.append(("workers", f"{runner.workers!r} is not a number of tasks. Give 1 or more, or leave it out"))
    if runner.engine == "local":
        given = [name for name in ("cluster", "workers") if getattr(runner, name) is not None]
        faults += [(name, "is for a cluster; set engine to ray or spark, or leave it out") for name in given]
    elif runner.endpoint is not None:
        faults.append(("endpoint", f"predicts on a server, engine {runner.engine} on a cluster; leave one of them out"))
    return faults


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _raise(faults: Faults) -> None:
    if faults:
        text = "; ".join(f"{path}: {message}" if path else message for path, message in faults)
        raise SpecError(f"this runner cannot be run: {text}. Correct it where it is written.", faults=faults)
