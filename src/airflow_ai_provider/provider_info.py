"""What Airflow's provider discovery asks for. Plain values: importing this loads nothing."""

from __future__ import annotations

from typing import Any

_PACKAGE = "airflow_ai_provider"


def get_provider_info() -> dict[str, Any]:
    """Describe the provider to Airflow: connection types with their form fields, and commands."""
    return {
        "package-name": "airflow-ai-provider",
        "name": "AI",
        "description": "Validated ingestion, pinned inference, decisions by confidence and actions with undo.",
        "connection-types": _CONNECTION_TYPES,
        "config": _CONFIG,
        "extra-links": [f"{_PACKAGE}.operators.{link}" for link in ("infer.ModelVersionLink", "landed.DataDocsLink")],
        "triggers": [
            {
                "integration-name": "AI",
                "python-modules": [f"{_PACKAGE}.triggers.topic", f"{_PACKAGE}.triggers.registry"],
            }
        ],
        "cli": [f"{_PACKAGE}.cli.get_cli_commands"],
    }


def _text(label: str, description: str, *, secret: bool = False) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": ["string", "null"]}
    if secret:
        schema["format"] = "password"
    return {"label": label, "description": description, "schema": schema}


def _number(label: str, description: str) -> dict[str, Any]:
    return {"label": label, "description": description, "schema": {"type": ["number", "null"]}}


def _option(kind: str, default: str, description: str) -> dict[str, Any]:
    return {"description": description, "version_added": "0.1.0", "type": kind, "example": None, "default": default}


_CONFIG: dict[str, Any] = {
    "ai_provider": {
        "description": "What a worker that predicts keeps where.",
        "options": {
            "model_cache_folder": _option(
                "string",
                "",
                "Folder of model files, shared by a machine's processes. Empty: ai_provider/models at home.",
            ),
            "model_cache_gb": _option(
                "float", "20", "Files of unused models are removed beyond so many gigabytes. 0 sets no limit."
            ),
            "gpu_lock_folder": _option(
                "string",
                "",
                "Folder of the GPUs' locks, the same for all workers of a machine. Empty: a temporary one.",
            ),
            "gpu_patience_s": _option("float", "3600", "How long a task waits for a GPU when all are taken."),
        },
    }
}

_CONNECTION_TYPES: list[dict[str, Any]] = [
    {
        "connection-type": "ai_store",
        "hook-class-name": f"{_PACKAGE}.hooks.store.StoreHook",
        "hook-name": "AI batch store",
        "conn-fields": {
            "uri": _text("URI", "Where batches lie: file:///data/ai, s3://bucket/prefix"),
            "endpoint_url": _text("Endpoint URL", "Only for an S3 API of your own"),
            "timeout_s": _number("Timeout (s)", "S3: how long a request may stay without an answer; default 15"),
        },
        "ui-field-behaviour": {
            "hidden-fields": ["host", "port", "schema"],
            "relabeling": {"login": "Access key", "password": "Secret key"},
            "placeholders": {},
        },
    },
    {
        "connection-type": "ai_ledger",
        "hook-class-name": f"{_PACKAGE}.hooks.ledger.LedgerHook",
        "hook-name": "AI ledger",
        "conn-fields": {
            "url": _text("Database URL", "Any SQLAlchemy URL; or fill in host, schema, login, password", secret=True)
        },
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {"schema": "Database"},
            "placeholders": {"host": "postgres", "schema": "ai_ledger"},
        },
    },
    {
        "connection-type": "mlflow",
        "hook-class-name": f"{_PACKAGE}.hooks.mlflow.MlflowRegistryHook",
        "hook-name": "MLflow registry",
        "conn-fields": {
            "tracking_uri": _text("Tracking URI", "Only without a server: sqlite:////data/mlflow.db", secret=True),
            "ui_url": _text("UI address", "Where people open MLflow, when it is not the host"),
            "allow_pickle": _text("May be unpickled", "Names of models whose files may run code, commas between"),
            "signed_by": _text("Signed by", "PEM file or text: every model must be signed by this key or authority"),
        },
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {"schema": "Scheme"},
            "placeholders": {"host": "http://mlflow", "port": "5000"},
        },
    },
    {
        "connection-type": "schema_registry",
        "hook-class-name": f"{_PACKAGE}.hooks.registry.SchemaRegistryHook",
        "hook-name": "Schema registry",
        "conn-fields": {"timeout_s": _number("Timeout (s)", "Per look-up, retries included; default 10")},
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {"schema": "Scheme", "password": "Password or bearer token"},
            "placeholders": {"host": "http://registry", "port": "8081"},
        },
    },
    {
        "connection-type": "ai_api",
        "hook-class-name": f"{_PACKAGE}.hooks.api.ApiHook",
        "hook-name": "AI action API",
        "conn-fields": {
            "timeout_s": _number("Timeout (s)", "Per request; default 30"),
            "patience_s": _number("Patience (s)", "How long a receiver that is away is tried again; default 60"),
            "in_flight": _number("Requests in flight", "At a time; default 64"),
        },
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {"schema": "Scheme", "password": "Password or bearer token"},
            "placeholders": {"host": "https://tickets.example.com"},
        },
    },
    {
        "connection-type": "ai_model_server",
        "hook-class-name": f"{_PACKAGE}.hooks.model_server.ModelServerHook",
        "hook-name": "AI model server",
        "conn-fields": {
            "protocol": _text(
                "Protocol", "oip (Triton, KServe, MLServer; the default), mlflow, torchserve, tensorflow"
            ),
            "model": _text("Model", "Its name on the server; default: the registered model's"),
            "version": _text("Version", "Only if the server counts otherwise than the registry; then no proof"),
            "outputs": _text("Outputs", "Names, with commas between; default: what the server gives"),
            "timeout_s": _number("Timeout (s)", "Per request; default 30"),
            "patience_s": _number("Patience (s)", "Over all tries of one request; default 120"),
            "in_flight": _number("Requests in flight", "At a time; default 8"),
        },
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {"schema": "Scheme", "password": "Password or bearer token"},
            "placeholders": {"host": "http://triton", "port": "8000"},
        },
    },
]
