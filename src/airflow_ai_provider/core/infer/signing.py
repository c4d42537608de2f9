"""The door to OpenSSF model signing: who vouches for a model's bytes.

Invariants: a signature counts only when it covers every file of the model; whatever the library cannot make sense of is
a refusal. It says who signed these bytes, not under which name or version they are registered.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from airflow_ai_provider.errors import MissingExtraError, ModelTrustError

try:
    from model_signing import verifying
except ImportError as error:  # OpenSSL too, which it needs and does not ask for
    raise MissingExtraError(
        f"checking a model's signature needs model-signing and pyOpenSSL ({error}). "
        "Run: pip install 'airflow-ai-provider[signing]'",
        extra="signing",
    ) from error

SIGNATURE = "model.sig"
"""Name of the file among the artifacts that holds a model's signature, or of the version's tag."""


def demand_signed(folder: Path, files: Mapping[str, str], signature: str, signed_by: str, what: str) -> None:
    """Refuse a model that is not signed by the key or authority asked for, in every file.

    :param folder: the model's files.
    :param files: path → digest of each of them.
    :param signature: text of the signature (a Sigstore bundle); empty when there is none.
    :param signed_by: PEM text of a public key (elliptic curve), or of the certificates at the root of the signer's.
    :param what: the model, for the message.
    :raises ModelTrustError: no signature, not by this key, or not of these bytes; no retry helps.
    """
    if not signature:
        raise ModelTrustError(
            f"{what} is not signed: it has neither a file {SIGNATURE} nor a tag of this name, and this task takes "
            "models only when they are. Sign the version (python -m include.models.sign), or pin one that is signed."
        )
    try:
        _verify(folder, signature, signed_by)
        covered = _covered(signature)
    except Exception as error:  # ValueError, KeyError, cryptography's own: each is a signature that does not hold
        # the library's text goes on with both digests, byte by byte
        said = str(error).strip().partition(": Expected")[0].replace("\\'", "'").splitlines()
        raise ModelTrustError(
            f"{what} is not taken, because its signature does not hold: {said[0][:300] if said else repr(error)}. "
            "Either its files were changed after they were signed, or somebody else signed them. Nothing was loaded."
        ) from error
    bare = sorted(path for path in files if path not in covered and path != SIGNATURE)
    if bare:
        raise ModelTrustError(
            f"{what} is not taken, because its signature leaves out {', '.join(bare[:5])}: whoever can write there "
            "could change them. Sign the whole folder, with nothing ignored.",
            paths=bare,
        )


def _verify(folder: Path, signature: str, signed_by: str) -> None:
    with tempfile.TemporaryDirectory(prefix="signature-") as aside:  # the library reads paths only
        key, bundle = Path(aside) / "key.pem", Path(aside) / SIGNATURE
        key.write_text(signed_by, encoding="utf-8")
        bundle.write_text(signature, encoding="utf-8")
        config: Any = verifying.Config()  # type: ignore[no-untyped-call]  # untyped there
        if "BEGIN CERTIFICATE" in signed_by:
            config.use_certificate_verifier(certificate_chain=[key])
        else:
            config.use_elliptic_key_verifier(public_key=key)
        config.verify(folder, bundle)


def _covered(signature: str) -> set[str]:
    """Return the files that a verified signature names: it may leave some out, and says so itself."""
    payload = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    return {str(resource["name"]) for resource in payload["predicate"]["resources"]}
