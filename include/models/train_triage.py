"""Train, calibrate and register the model ``triage``: is a biopsy malignant or benign?

Invariants: it learns from one half of the biopsies only; its confidence is calibrated on scores of rows that the model
giving them had not seen (five inner splits); the same variant gives the same bytes and is registered once.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_ai_provider.core.batch import canonical_json
from include.data import SEED, TRIAGE_CLASSES, biopsies, feature_names
from include.models.registry import register_once

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sklearn.pipeline import Pipeline

NAME, ALIAS = "triage", "champion"
# Strength of the regularisation. Weak enough to be right, strong enough that some biopsies stay ambiguous.
VARIANTS = {"modest": 0.03, "timid": 0.003}


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be registered.

    :param onnx: the model's bytes: one float matrix of 30 columns in, class index and probabilities out.
    :param metadata: classes in the order of the probabilities, and the calibration of the confidence.
    :param accuracy: share of learning rows that the inner splits got right.
    """

    onnx: bytes
    metadata: dict[str, Any]
    accuracy: float

    @property
    def digest(self) -> str:
        """SHA-256 of the model's bytes and of what is registered beside them."""
        content = hashlib.sha256(self.onnx)
        content.update(canonical_json(self.metadata))
        return "sha256:" + content.hexdigest()


def train(variant: str = "modest") -> Trained:
    """Train one variant on the learning half.

    :param variant: one of :data:`VARIANTS`.
    """
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from airflow_ai_provider.core.decide.calibrate import fit_platt

    learn, _ = biopsies()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=VARIANTS[variant], random_state=SEED))
    inner = StratifiedKFold(5, shuffle=False)
    unseen: NDArray[np.float64] = cross_val_predict(model, learn.rows, learn.labels, cv=inner, method="predict_proba")
    correct = unseen.argmax(axis=1) == learn.labels
    calibration = fit_platt(unseen.max(axis=1), correct)
    fitted: Pipeline = model.fit(learn.rows, learn.labels)
    exported = to_onnx(
        fitted,
        initial_types=[("biopsies", FloatTensorType([None, learn.rows.shape[1]]))],
        options={id(fitted): {"zipmap": False}},
        name=f"{NAME}-{variant}",  # the default is random, and the digest would be too
    )
    metadata = {"classes": list(TRIAGE_CLASSES), "calibration": calibration.to_dict()}
    return Trained(exported.SerializeToString(), metadata, float(correct.mean()))


def register(trained: Trained, tracking_uri: str, *, alias: str = ALIAS) -> str:
    """Register the model once and let the alias point at it.

    :param tracking_uri: MLflow's address.
    :param alias: moved to this version; empty leaves all aliases alone.
    :return: the model version.
    """

    def log() -> Any:
        import mlflow
        import onnx

        return mlflow.onnx.log_model(
            onnx.load_from_string(trained.onnx),
            name=NAME,
            signature=_signature(),
            metadata=trained.metadata,
            registered_model_name=NAME,
            pip_requirements=["onnxruntime"],  # else MLflow loads the model in a process of its own to find out
        )

    facts = {"learned_from": "half of scikit-learn's breast_cancer", "seed": SEED, "accuracy": trained.accuracy}
    return register_once(NAME, trained.digest, tracking_uri, log, alias=alias, facts=facts)


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    rows = Schema([ColSpec("double", name) for name in feature_names()])
    label = TensorSpec(np.dtype("int64"), (-1,), "label")
    return ModelSignature(rows, Schema([label, TensorSpec(np.dtype("float32"), (-1, 2), "probabilities")]))


def main() -> None:
    """Train and register from the command line."""
    parser = argparse.ArgumentParser(description="Train the tumour triage model and register it in MLflow.")
    parser.add_argument("tracking_uri", help="MLflow's address: http://host:port, or sqlite:///file")
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="modest")
    parser.add_argument("--alias", default=ALIAS, help="alias to move to this version; empty moves none")
    given = parser.parse_args()
    trained = train(given.variant)
    print(f"trained on {len(biopsies()[0].labels)} biopsies; inner splits: {trained.accuracy:.1%} right")
    print(f"confidence: {trained.metadata['calibration']}")
    version = register(trained, given.tracking_uri, alias=given.alias)
    print(f"{NAME} version {version} {trained.digest[:19]}… alias {given.alias or '(none)'} at {given.tracking_uri}")


if __name__ == "__main__":
    main()
