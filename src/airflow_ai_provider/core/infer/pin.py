"""The door to MLflow: an alias becomes one version, its bytes' digest and its signature, once.

Invariants: a registry that is down or hangs is an error within about twenty seconds; no credential gets into a pin or a
message; nothing is opened here, and what may be is said by :mod:`.trust`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import yaml

from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.core.infer import cache
from airflow_ai_provider.core.infer.choose import parse_model
from airflow_ai_provider.core.infer.trust import Trust, flavor_of
from airflow_ai_provider.errors import (
    AiProviderError,
    ConnectionConfigError,
    MissingExtraError,
    ModelPinError,
    RegistryUnavailableError,
    SignatureError,
)

try:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
except ImportError as error:
    raise MissingExtraError(
        f"pinning a model needs mlflow, which is not installed ({error}). "
        "Run: pip install 'airflow-ai-provider[mlflow]'",
        extra="mlflow",
    ) from error

# Two tries of eight seconds: MLflow's own seven tries of two minutes would hold a worker for a quarter of an hour.
# Each is a default: what the operator of the site has set stays.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PGCONNECT_TIMEOUT": "8",
}
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}
_environment_lock = threading.RLock()
_DATA_ONLY = Trust()


class MlflowRegistry:
    """A registry of MLflow's, as :class:`~airflow_ai_provider.core.infer.choose.Registry` promises.

    :param tracking_uri: as :func:`resolve_pin` takes it.
    :param cache_dir: as there.
    :param trust: what may be opened.
    """

    def __init__(self, tracking_uri: str, cache_dir: str | Path, trust: Trust = _DATA_ONLY) -> None:
        self._uri, self._cache_dir, self._trust = tracking_uri, cache_dir, trust
        self.address = _without_login(tracking_uri)

    def aliases(self, name: str) -> dict[str, str]:
        with asking(self._uri) as client:
            return _aliases(client, name)

    def created(self, name: str, version: str) -> datetime | None:
        with asking(self._uri) as client:
            found = _found(lambda: client.get_model_version(name, version))
        return datetime.fromtimestamp(found.creation_timestamp / 1000, UTC) if found else None

    def resolve(self, model: str) -> Pin:
        return resolve_pin(model, self._uri, self._cache_dir, self._trust)


def resolve_pin(model: str, tracking_uri: str, cache_dir: str | Path, trust: Trust = _DATA_ONLY) -> Pin:
    """Fix a model: which version, and which bytes; leave the bytes in this machine's cache.

    :param model: ``name@alias`` or ``name/version`` of a registered model.
    :param tracking_uri: the registry: ``http(s)://`` (credentials as user:password@), ``sqlite:///``, ``file:``.
    :param cache_dir: folder that this machine's workers share.
    :param trust: what may be opened, and who must have signed it.
    :return: the pin; whatever the alias does later, it names this version and these bytes.
    :raises SpecError: the model is not written as one of the two forms; a retry does not help.
    :raises ModelPinError: model, alias or version is not there; no retry helps.
    :raises ModelTrustError: its format is code, or it is not signed as asked; no retry helps.
    :raises SignatureError: the model has no signature; no retry helps.
    :raises RegistryUnavailableError: the registry does not answer; a retry may help.
    """
    name, alias, wanted = parse_model(model)
    with asking(tracking_uri) as client, cache.aside(cache_dir) as folder:
        found = _find_version(client, name, alias, wanted)
        version = str(found.version)
        _copy_files(client, name, version, folder)
        files = cache.hash_files(folder)
        if trust.signed_by:
            _demand_signed(found, folder, files, trust.signed_by)
        described = _described(folder, name, version)
        pin = Pin(
            name=name,
            version=version,
            alias=alias,
            digest=digest_of(files),
            files=files,
            flavor=flavor_of(described, files, folder, trust, name=name, version=version),
            signature=_signature(described, name, version),
            metadata=json.loads(json.dumps(described.get("metadata") or {}, default=str)),
            registry=_without_login(tracking_uri),
        )
        cache.place(folder, cache.folder_of(pin.digest, cache_dir), files)
    return pin


def download(name: str, version: str, tracking_uri: str, folder: Path) -> None:
    """Copy every artifact file of a model version into a folder.

    :raises ModelPinError: the version is gone; no retry helps.
    :raises RegistryUnavailableError: the registry does not answer; a retry may help.
    """
    with asking(tracking_uri) as client:
        _copy_files(client, name, version, folder)


def probe_registry(tracking_uri: str) -> str:
    """Ask the registry for its models and say in one sentence what it answered.

    :raises RegistryUnavailableError: it does not answer; a retry may help.
    """
    with asking(tracking_uri) as client:
        names = _names(client)
    shown = (
        f"its registered models: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "no models yet"
    )
    return f"{_without_login(tracking_uri)} answers, {shown}"


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    model = _found(lambda: client.get_registered_model(name))
    if model is None:
        names = _names(client)
        raise ModelPinError(
            f"the registry has no model {name!r}; it has {names or 'none'}. Register it "
            "(mlflow.onnx.log_model(..., registered_model_name=...)) or correct the name.",
            name=name,
            found=names,
        )
    return {str(key): str(value) for key, value in dict(model.aliases).items()}


def _find_version(client: MlflowClient, name: str, alias: str, version: str) -> Any:
    aliases = _aliases(client, name)
    if alias and alias not in aliases:
        raise ModelPinError(
            f"model {name} has no alias {alias!r}; it has {aliases or 'none'}. Set it "
            f"(MlflowClient().set_registered_model_alias({name!r}, {alias!r}, version)) or correct the alias.",
            name=name,
            alias=alias,
            found=aliases,
        )
    wanted = aliases[alias] if alias else version
    found = _found(lambda: client.get_model_version(name, wanted))
    if found is None:
        versions = _versions(client, name)
        raise ModelPinError(
            f"model {name} has no version {wanted}; it has {versions or 'none'}. Choose one of them or register it.",
            name=name,
            version=wanted,
            found=versions,
        )
    if found.status != "READY":
        raise RegistryUnavailableError(
            f"version {wanted} of model {name} is {found.status}, not READY: the registry has not finished taking it. "
            "The retry asks again.",
            name=name,
            version=wanted,
        )
    return found


def _demand_signed(found: Any, folder: Path, files: Mapping[str, str], signed_by: str) -> None:
    """Check the signature that lies among the files or, if none does, in the version's tags."""
    from airflow_ai_provider.core.infer.signing import SIGNATURE, demand_signed

    inside = folder / SIGNATURE
    text = inside.read_text(encoding="utf-8") if inside.is_file() else dict(found.tags).get(SIGNATURE, "")
    demand_signed(folder, files, text, signed_by, f"model {found.name} version {found.version}")


def _found(ask: Any) -> Any:
    """Return what the registry answers, or None when it says that there is no such thing."""
    try:
        return ask()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            return None
        raise


def _names(client: MlflowClient) -> list[str]:
    return sorted(str(found.name) for found in client.search_registered_models(max_results=50))


def _versions(client: MlflowClient, name: str) -> list[int]:
    quote = '"' if "'" in name else "'"
    return sorted(int(found.version) for found in client.search_model_versions(f"name={quote}{name}{quote}"))


def _copy_files(client: MlflowClient, name: str, version: str, folder: Path) -> None:
    """Take the files from where the version's artifacts lie. (MLflow's download by ``models:/name/version`` would add
    a file of its own to them.)"""
    uri = _found(lambda: client.get_model_version_download_uri(name, version))
    if uri is None:
        raise ModelPinError(
            f"version {version} of model {name} is no longer in the registry. Clear the pin task to pin another.",
            name=name,
            version=version,
        )
    artifacts: Any = get_artifact_repository(uri, tracking_uri=client.tracking_uri)
    artifacts.download_artifacts("", dst_path=str(folder))


def _described(folder: Path, name: str, version: str) -> Mapping[str, Any]:
    path = folder / "MLmodel"
    if not path.is_file():
        raise ModelPinError(
            f"version {version} of model {name} holds no MLmodel file, so nothing says what it is. "
            "Register it through mlflow's log_model.",
            name=name,
            version=version,
        )
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    return described if isinstance(described, dict) else {}


def _signature(described: Mapping[str, Any], name: str, version: str) -> dict[str, Any]:
    signature = described.get("signature") or {}
    read = {side: json.loads(signature.get(side) or "null") or [] for side in ("inputs", "outputs")}
    if not read["inputs"]:
        raise SignatureError(
            f"version {version} of model {name} has no signature, so nothing says which columns it takes. "
            "Log it with log_model(..., signature=mlflow.models.infer_signature(rows, predictions)) as a new version.",
            name=name,
            version=version,
        )
    return read


@contextlib.contextmanager
def asking(tracking_uri: str) -> Iterator[MlflowClient]:
    """Give a client that loses patience soon, and turn what it raises into our errors."""
    shown = _without_login(tracking_uri)
    _demand_there(tracking_uri, shown)
    parts = urlsplit(tracking_uri)
    login = {}
    uri = tracking_uri
    if parts.scheme in ("http", "https") and parts.username:
        # By variables, not in the address: MLflow puts the address into its messages.
        login = {
            "MLFLOW_TRACKING_USERNAME": unquote(parts.username),
            "MLFLOW_TRACKING_PASSWORD": unquote(parts.password or ""),
        }
        uri = shown
    patience = {key: value for key, value in _PATIENCE.items() if key not in os.environ}
    with _environment(patience | login):
        try:
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)
        except AiProviderError:
            raise
        except Exception as error:
            known = _translated(error, shown, tracking_uri)
            if known is None:
                raise
            raise known from None if parts.password else error


def _translated(error: Any, shown: str, tracking_uri: str) -> AiProviderError | None:
    said = str(error).replace(tracking_uri, shown).strip().splitlines()
    text = said[0][:300] if said else type(error).__name__
    if isinstance(error, MlflowException):
        asked: Any = error
        status = asked.get_http_status_code()
        if status in (401, 403):
            return ConnectionConfigError(
                f"the registry at {shown} refuses this login ({status}): {text}. Correct the mlflow connection.",
                registry=shown,
            )
        if "maintenance mode" in text:
            return ConnectionConfigError(
                f"the registry at {shown} is a folder of files, which this MLflow opens only when the variable "
                "MLFLOW_ALLOW_FILE_STORE is true. Migrate it to sqlite:/// (mlflow migrate-filestore) or set it.",
                registry=shown,
            )
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return ModelPinError(
                f"the registry at {shown} has it no longer: {text}. Clear the pin task.", registry=shown
            )
    elif not isinstance(error, OSError) and not type(error).__module__.startswith("sqlalchemy"):
        return None
    return RegistryUnavailableError(
        f"the registry at {shown} did not answer as it should: {text}. Check that it runs and is reachable from this "
        "worker; the retry asks again.",
        registry=shown,
    )


def _demand_there(tracking_uri: str, shown: str) -> None:
    """Notice in a moment what MLflow would notice after many tries: nobody listens, or there is no such file."""
    parts = urlsplit(tracking_uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme == "sqlite" and parts.path.strip("/") and not Path(parts.path[1:]).exists():
        raise ConnectionConfigError(
            f"there is no registry at {shown}: no such file. Correct the mlflow connection.", registry=shown
        )
    through_proxy = parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")
    if scheme not in _PORTS or not parts.hostname or through_proxy:
        return
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), timeout=8).close()
    except OSError as error:
        raise RegistryUnavailableError(
            f"nobody answers at {shown}: {error}. Check that the registry runs and is reachable from this worker; "
            "the retry asks again.",
            registry=shown,
        ) from error


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the calls inside: MLflow takes these settings from nowhere else."""
    with _environment_lock:
        before = {key: os.environ.get(key) for key in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value


def _without_login(uri: str) -> str:
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
