"""The door to the Kubernetes client: what a task's pod asks for.

Invariant: only resources are overridden; image, volumes and the rest stay those of the executor's pod template.
"""

from __future__ import annotations

from airflow_ai_provider.errors import MissingExtraError

try:
    from kubernetes.client import models as k8s
except ImportError as error:
    raise MissingExtraError(
        f"a task with GPUs on a Kubernetes executor needs the Kubernetes client, which is not installed ({error}). "
        "Run: pip install 'airflow-ai-provider[kubernetes]'",
        extra="kubernetes",
    ) from error

MAIN_CONTAINER = "base"  # what Airflow's Kubernetes executor calls the task's own container


def gpu_pod(count: int) -> k8s.V1Pod:
    """Return the override that gives the task's container GPUs.

    :param count: how many; Kubernetes gives whole GPUs, and its limit is its request.
    """
    resources = k8s.V1ResourceRequirements(limits={"nvidia.com/gpu": str(count)})
    container = k8s.V1Container(name=MAIN_CONTAINER, resources=resources)
    return k8s.V1Pod(spec=k8s.V1PodSpec(containers=[container]))
