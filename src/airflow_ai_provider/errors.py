"""Every error of the provider, in one tree.

::

    AiProviderError
    ├── TransientError                    another try may pass
    │   ├── SourceUnavailableError        broker, file system or store did not answer
    │   ├── RegistryUnavailableError      model or schema registry did not answer
    │   ├── LedgerUnavailableError        the ledger's database did not answer
    │   ├── LedgerStateError              a ledger line has moved on since it was read
    │   ├── EngineUnavailableError        a model server did not answer
    │   ├── DeviceBusyError               every GPU of the worker stayed taken
    │   ├── EngineMemoryError             a call of the model did not fit into memory
    │   └── ActionUnavailableError        the receiver said "later" and surely did nothing
    ├── TerminalError                     the same input fails again
    │   ├── SpecError (ValueError)        what the author wrote cannot be run
    │   ├── ConnectionConfigError         an Airflow connection is missing or wrong
    │   ├── MissingExtraError (ImportError)  an optional part is not installed
    │   ├── SourceError                   topic, file or offsets are not there
    │   ├── SpanConflictError             another run owns some of these rows
    │   ├── BatchRejectedError            too many rows failed, or a whole-batch rule did
    │   ├── CorruptBatchError             stored bytes differ from their manifest
    │   ├── RowMismatchError              rows do not add up
    │   ├── ModelPinError                 the model is not there, or not the one pinned
    │   ├── SignatureError                the model's signature does not fit the rows
    │   ├── ModelTrustError               the model could run code, or its signer is not the one asked for
    │   ├── GateFailedError               a new model does not reach the bars of its gate
    │   ├── DeviceError                   the required device is not what the engine runs on
    │   ├── ActionRejectedError           the receiver refused, for good
    │   ├── IdempotencyConflictError      one key, two different payloads
    │   └── SagaFailedError               a step failed after others succeeded
    ├── UnknownOutcomeError               a call left, no answer came: resolve through the ledger
    └── CompensationError (ExceptionGroup)  some undo failed and waits for a person

Invariants: every error says what happened, the value, the rule and the next move; its facts are attributes;
it pickles; it carries no secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class AiProviderError(Exception):
    """Root of the tree.

    :param message: what happened, the value, the rule, the next move.
    :param facts: the same facts as values; each becomes an attribute.
    """

    def __init__(self, message: str = "", /, **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

    def __getattr__(self, name: str) -> Any:
        # Facts are set per instance; this only tells type checkers that they exist.
        raise AttributeError(f"{type(self).__name__} has no fact {name!r}; it has {sorted(self.__dict__)}")


class TransientError(AiProviderError):
    """Another try may pass: Airflow retries it."""


class SourceUnavailableError(TransientError):
    """The broker, file system or object store did not answer in time."""


class RegistryUnavailableError(TransientError):
    """The model registry or schema registry did not answer in time."""


class LedgerUnavailableError(TransientError):
    """The ledger's database did not answer, or was locked for too long."""


class LedgerStateError(TransientError):
    """A ledger line has moved on since it was read: another process works on it, and a retry reads it again."""


class EngineMemoryError(TransientError):
    """A call of the model did not fit into memory: the next try makes smaller ones, or finds more memory free."""


class EngineUnavailableError(TransientError):
    """The model, or its server, did not answer in time, or cannot predict even what it predicted before."""


class DeviceBusyError(TransientError):
    """Every GPU of the worker stayed taken by other tasks for as long as this one may wait."""


class ActionUnavailableError(TransientError):
    """The receiver surely did nothing and may do it later (connection refused, 429, 503)."""


class TerminalError(AiProviderError):
    """The same input fails again: Airflow does not retry it."""


class SpecError(TerminalError, ValueError):
    """What the author wrote cannot be run; ``faults`` lists every fault as ``(path, message)``."""


class ConnectionConfigError(TerminalError):
    """An Airflow connection is missing, of the wrong type, or asks for what is not allowed."""


class MissingExtraError(TerminalError, ImportError):
    """An optional part is not installed; the message names the extra to install."""


class SourceError(TerminalError):
    """The topic, file or offsets asked for are not there (any more)."""


class SpanConflictError(TerminalError):
    """Another run has claimed some of the rows that this run asks for."""


class BatchRejectedError(TerminalError):
    """More rows failed than is allowed, or all of them in the model, or a whole-batch expectation failed."""


class CorruptBatchError(TerminalError):
    """Stored bytes are missing or differ from what the manifest says."""


class RowMismatchError(TerminalError):
    """Rows were lost, doubled or reordered: counts or row ids do not add up."""


class ModelPinError(TerminalError):
    """The model, version or alias is not there, or the bytes differ from the pin."""


class SignatureError(ModelPinError):
    """The model has no signature, or it does not fit the rows."""


class ModelTrustError(ModelPinError):
    """Opening the model could run code that nobody allowed, or it is not signed by whom it must be signed."""


class GateFailedError(TerminalError):
    """A new model does not reach a bar of its gate; ``comparison`` holds the figures."""


class DeviceError(TerminalError):
    """The engine does not run on the device that the author requires."""


class ActionRejectedError(TerminalError):
    """The receiver refused an action for good; nothing was done for it."""


class IdempotencyConflictError(TerminalError):
    """The same idempotency key came with another payload."""


class SagaFailedError(TerminalError):
    """A step failed after others succeeded; what was done is listed for undo."""


class UnknownOutcomeError(AiProviderError):
    """A call left and no answer came. Look the key up in the ledger before anything else; Airflow retries it,
    and the retry asks again under the same key."""


class CompensationError(AiProviderError, ExceptionGroup):
    """Some undo failed; each is parked in the ledger for a person.

    :param message: how many failed and where to look.
    :param errors: one error per failed undo.
    """

    def __new__(cls, message: str, errors: Sequence[Exception], /, **facts: Any) -> CompensationError:
        return ExceptionGroup.__new__(cls, message, list(errors))

    def __init__(self, message: str, errors: Sequence[Exception], /, **facts: Any) -> None:
        Exception.__init__(self, message, list(errors))
        self.__dict__.update(facts)
