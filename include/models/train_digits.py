"""Train, calibrate and register the model ``digits``: which digit is on a scan of 8 × 8 pixels?

Invariants: it learns from one half of the scans only, and its confidence is calibrated on a part of that half which the
network has not seen; the same seed gives the same weights; what is registered is a graph exported by ``torch.export``,
not a pickle.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_ai_provider.core.batch import canonical_json
from include.data import DIGIT_CLASSES, SEED, Part, digits
from include.models.registry import register_once

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

NAME, ALIAS = "digits", "champion"
EPOCHS, CALIBRATED_ON = 30, 250


@dataclass(frozen=True)
class Trained:
    """A trained network, ready to be registered.

    :param network: images in, probabilities of the ten digits out.
    :param metadata: classes in the order of the probabilities, and the calibration of the confidence.
    :param accuracy: share of the calibration scans that the network got right.
    """

    network: torch.nn.Module
    metadata: dict[str, Any]
    accuracy: float

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of what is registered beside them."""
        content = hashlib.sha256(canonical_json(self.metadata))
        for name, weights in sorted(self.network.state_dict().items()):
            content.update(name.encode() + weights.numpy().tobytes())
        return "sha256:" + content.hexdigest()


def train(epochs: int = EPOCHS) -> Trained:
    """Train on the learning half.

    :param epochs: how often each scan is shown.
    """
    import torch

    from airflow_ai_provider.core.decide.calibrate import fit_platt

    learn, _ = digits()
    images, labels = torch.from_numpy(_images(learn)), torch.from_numpy(learn.labels)
    torch.manual_seed(SEED)
    network = _network()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels) - CALIBRATED_ON).split(64):
            optimizer.zero_grad()
            likelihood = network(images[CALIBRATED_ON + chosen]).clamp_min(1e-9).log()
            torch.nn.functional.nll_loss(likelihood, labels[CALIBRATED_ON + chosen]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        seen = network(images[:CALIBRATED_ON]).numpy()
    correct = seen.argmax(axis=1) == learn.labels[:CALIBRATED_ON]
    calibration = fit_platt(seen.max(axis=1), correct)
    metadata = {"classes": list(DIGIT_CLASSES), "calibration": calibration.to_dict()}
    return Trained(network, metadata, float(correct.mean()))


def register(trained: Trained, tracking_uri: str, *, alias: str = ALIAS) -> str:
    """Register the network once and let the alias point at it.

    :param tracking_uri: MLflow's address.
    :param alias: moved to this version; empty leaves all aliases alone.
    :return: the model version.
    """

    def log() -> Any:
        import mlflow

        return mlflow.pytorch.log_model(
            trained.network,
            name=NAME,
            signature=_signature(),
            input_example=_images(digits()[0])[:2],  # torch.export traces it
            serialization_format="pt2",
            metadata=trained.metadata,
            registered_model_name=NAME,
            pip_requirements=["torch"],  # else MLflow loads the model in a process of its own to find out
        )

    facts = {"learned_from": "half of scikit-learn's digits", "seed": SEED, "accuracy": trained.accuracy}
    return register_once(NAME, trained.digest, tracking_uri, log, alias=alias, facts=facts)


def _images(part: Part) -> NDArray[np.float32]:
    """Return what an engine makes of the PNG files: one channel, grey values from 0 to 1."""
    grey = np.rint(part.rows * 255 / 16).astype(np.float32) / 255
    return np.ascontiguousarray(grey[:, None, :, :])


def _network() -> torch.nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, len(DIGIT_CLASSES)),
        nn.Softmax(dim=1),
    )


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype("float32"), (-1, 1, 8, 8), "bytes")])
    return ModelSignature(images, Schema([TensorSpec(np.dtype("float32"), (-1, len(DIGIT_CLASSES)), "probabilities")]))


def main() -> None:
    """Train and register from the command line."""
    parser = argparse.ArgumentParser(description="Train the digit sorting network and register it in MLflow.")
    parser.add_argument("tracking_uri", help="MLflow's address: http://host:port, or sqlite:///file")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--alias", default=ALIAS, help="alias to move to this version; empty moves none")
    given = parser.parse_args()
    trained = train(given.epochs)
    print(f"trained on {len(digits()[0].labels) - CALIBRATED_ON} scans")
    print(f"{trained.accuracy:.1%} of {CALIBRATED_ON} others right")
    print(f"confidence: {trained.metadata['calibration']}")
    version = register(trained, given.tracking_uri, alias=given.alias)
    print(f"{NAME} version {version} {trained.digest[:19]}… alias {given.alias or '(none)'} at {given.tracking_uri}")


if __name__ == "__main__":
    main()
