"""Signatures of models, with real keys and certificates: whose, over which bytes, over all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from model_signing import hashing, signing

from airflow_ai_provider.core.infer.cache import hash_files
from airflow_ai_provider.core.infer.signing import SIGNATURE, demand_signed
from airflow_ai_provider.errors import ModelTrustError

PEM, NO_PASSWORD = serialization.Encoding.PEM, serialization.NoEncryption()


class Signer:
    """Somebody with a key: ``private`` is its file, ``public`` the text that others have."""

    def __init__(self, folder: Path, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.private = folder / f"{name}.pem"
        self.private.write_bytes(self.key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, NO_PASSWORD))
        kind = serialization.PublicFormat.SubjectPublicKeyInfo
        self.public = self.key.public_key().public_bytes(PEM, kind).decode()

    def sign(self, model: Path, ignored: Sequence[str] = (), bundle: Path | None = None) -> str:
        """Return the signature's text; written into the model when ``bundle`` says so."""
        bundle = bundle or self.private.with_suffix(".sig")
        config = hashing.Config().set_ignored_paths(paths=[model / path for path in ignored], ignore_git_paths=False)
        signer = signing.Config().use_elliptic_key_signer(private_key=self.private)
        signer.set_hashing_config(config).sign(model, bundle)
        return bundle.read_text()


@pytest.fixture
def team(tmp_path: Path) -> Signer:
    return Signer(tmp_path, "team")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {onnx: {}}")
    (folder / "data" / "model.onnx").write_bytes(b"weights")
    return folder


def demand(model: Path, signature: str, signed_by: str) -> None:
    demand_signed(model, hash_files(model), signature, signed_by, "model triage version 3")


def test_a_model_signed_by_the_key_is_taken(team: Signer, model: Path) -> None:
    demand(model, team.sign(model), team.public)


def test_a_signature_among_the_files_is_not_asked_to_sign_itself(team: Signer, model: Path) -> None:
    demand(model, team.sign(model, [SIGNATURE], model / SIGNATURE), team.public)


def test_a_model_without_a_signature_is_refused_with_the_next_move(team: Signer, model: Path) -> None:
    with pytest.raises(ModelTrustError, match=r"triage version 3 is not signed.*model\.sig.*include\.models\.sign"):
        demand(model, "", team.public)


def test_another_key_is_another_signer(team: Signer, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelTrustError, match="does not hold.*somebody else"):
        demand(model, Signer(tmp_path, "intruder").sign(model), team.public)


@pytest.mark.parametrize("how", ["changed", "added", "removed", "renamed"])
def test_other_files_than_the_signed_ones_are_refused(how: str, team: Signer, model: Path) -> None:
    signature, file = team.sign(model), model / "data" / "model.onnx"
    {
        "changed": lambda: file.write_bytes(b"weight5"),
        "added": lambda: (model / "hook.py").write_text("import os"),
        "removed": file.unlink,
        "renamed": lambda: file.rename(model / "data" / "other.onnx"),
    }[how]()
    with pytest.raises(ModelTrustError, match="does not hold"):
        demand(model, signature, team.public)


def test_a_signature_that_leaves_files_out_is_refused_though_it_verifies(team: Signer, model: Path) -> None:
    signature = team.sign(model, ignored=["MLmodel"])
    with pytest.raises(ModelTrustError, match="leaves out MLmodel.*nothing ignored") as caught:
        demand(model, signature, team.public)
    assert caught.value.paths == ["MLmodel"]


@pytest.mark.parametrize("text", ["no JSON", "{}", "[]", '{"dsseEnvelope": {"payload": "e30="}}', "\x00"])
def test_what_is_no_signature_is_refused(text: str, team: Signer, model: Path) -> None:
    with pytest.raises(ModelTrustError, match="does not hold"):
        demand(model, text, team.public)


@pytest.mark.parametrize("key", ["-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no key"])
def test_what_is_no_key_takes_nothing(key: str, team: Signer, model: Path) -> None:
    with pytest.raises(ModelTrustError, match="does not hold"):
        demand(model, team.sign(model), key)


# --- certificates ---


def certificate(subject: str, key: ec.EllipticCurvePrivateKey, by: Signer, issuer: str, is_authority: bool) -> str:
    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    usage = functools.partial(
        x509.KeyUsage,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(usage(digital_signature=not is_authority, key_cert_sign=is_authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key()), critical=False)
    )
    if not is_authority:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    return made.sign(by.key, hashes.SHA256()).public_bytes(PEM).decode()


def test_a_certificate_of_the_authority_vouches_and_one_of_another_does_not(
    team: Signer, model: Path, tmp_path: Path
) -> None:
    roots = {name: Signer(tmp_path, name) for name in ("house", "stranger")}
    trusted = {name: certificate(name, root.key, root, name, True) for name, root in roots.items()}
    (tmp_path / "root.crt").write_text(trusted["house"])
    (tmp_path / "team.crt").write_text(certificate("team", team.key, roots["house"], "house", False))
    bundle = tmp_path / "by-certificate.sig"
    signing.Config().use_certificate_signer(
        private_key=team.private,
        signing_certificate=tmp_path / "team.crt",
        certificate_chain=[tmp_path / "root.crt"],
    ).sign(model, bundle)
    demand(model, bundle.read_text(), trusted["house"])
    with pytest.raises(ModelTrustError, match="does not hold"):
        demand(model, bundle.read_text(), trusted["stranger"])
    with pytest.raises(ModelTrustError, match="does not hold"):
        demand(model, bundle.read_text(), team.public)
