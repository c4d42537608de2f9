"""Sign a registered model version, so that a pin task with ``signed_by`` takes it.

    python -m include.models.sign triage@champion --key team-private.pem --registry http://mlflow:5000

The signature is OpenSSF's (model-signing): over every file of the version, by a key that stays with whoever signs. It
is kept as the version's tag ``model.sig``, so the files that are signed stay as they are. The key is made once by:

    openssl ecparam -name prime256v1 -genkey -noout -out team-private.pem
    openssl ec -in team-private.pem -pubout -out team.pem

``team.pem`` goes to the workers (or, as text, into the mlflow connection); ``team-private.pem`` never does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from airflow_ai_provider.core.infer.cache import folder_of
from airflow_ai_provider.core.infer.signing import SIGNATURE


def sign(model: str, registry: str, key: str | Path, password: str | None = None) -> str:
    """Sign a version and keep the signature with it.

    :param model: ``name@alias`` or ``name/version``.
    :param registry: MLflow's tracking URI.
    :param key: PEM file of the private key, on an elliptic curve (P-256, P-384 or P-521).
    :param password: of the key, when it has one.
    :return: the version that was signed.
    """
    from mlflow import MlflowClient
    from model_signing import hashing, signing

    from airflow_ai_provider.core.infer.pin import resolve_pin
    from airflow_ai_provider.core.infer.trust import Trust

    with tempfile.TemporaryDirectory(prefix="sign-") as aside:
        # served: what it is signs itself; whether it may be opened is asked where it is pinned
        pin = resolve_pin(model, registry, aside, Trust(served=True))
        everything = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
        bundle = Path(aside) / SIGNATURE
        signer = signing.Config().use_elliptic_key_signer(private_key=Path(key), password=password)
        signer.set_hashing_config(everything).sign(folder_of(pin.digest, aside), bundle)
        MlflowClient(registry, registry).set_model_version_tag(pin.name, pin.version, SIGNATURE, bundle.read_text())
    return f"{pin.name} version {pin.version}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Sign what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="name@alias or name/version")
    parser.add_argument("--key", required=True, help="PEM file of the private key")
    parser.add_argument("--registry", required=True, help="MLflow's tracking URI")
    asked = parser.parse_args(arguments)
    signed = sign(asked.model, asked.registry, asked.key, os.environ.get("MODEL_KEY_PASSWORD"))
    parser.exit(message=f"{signed} is signed\n")


if __name__ == "__main__":
    main()
