"""What runs decar in containers: compose.yaml and the Helm chart are valid, and stop as decar does."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/decar"
LEAST = {"ensemble": {"claim": "models"}, "apiKey": {"value": "secret"}}
MOST = {
    "ensemble": {"claim": "models", "subPath": "demo/v2"},
    "apiKey": {"existingSecret": "keys", "secretKey": "user"},
    "adminKey": {"existingSecret": "keys", "secretKey": "admin"},
    "args": ["--max-num-seqs", "64"],
    "env": [{"name": "OTEL_SERVICE_NAME", "value": "demo"}],
    "shutdownTimeoutSeconds": 120,
    "preStopSeconds": 11,
    "startSeconds": 61,
    "liveSeconds": 31,
    "gpu": {"count": 2, "resource": "nvidia.com/mig-1g.10gb"},
    "runtimeClassName": "nvidia",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "podAnnotations": {"team": "models"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "podDisruptionBudget": {"maxUnavailable": "50%"},
}
NO_GPU = {**LEAST, "gpu": {"count": 0}, "podDisruptionBudget": {"enabled": False}}
STOPS_S = 10
"""Beyond --shutdown-timeout: 5 s for those who are told, and the engines' end."""


def rendered(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What Helm makes of the chart, by kind."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name="demo", namespace="models")
    texts = [text for name, text in files.items() if name.endswith(".yaml") and text.strip()]
    return {document["kind"]: document for document in map(yaml.safe_load, texts)}


def container_of(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's specification, and its container's."""
    pod = rendered(values)["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


@pytest.mark.parametrize("values", [LEAST, MOST, NO_GPU], ids=["least", "most", "no-gpu"])
@pytest.mark.parametrize("version", ["1.29", "1.32", "1.37"])
def test_helm_and_kubernetes_take_the_chart(values: dict[str, Any], version: str) -> None:
    helm_python.lint(CHART, values, strict=True, kube_version=f"{version}.0")
    documents = rendered(values)
    monitor = documents.pop(
        "ServiceMonitor", None
    )  # an operator's, which Kubernetes' own schemas do not have
    assert (monitor is not None) == (values is MOST)
    for document in documents.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_there_is_what_was_asked_for() -> None:
    assert set(rendered(LEAST)) == {"Deployment", "Service", "Secret", "PodDisruptionBudget"}
    assert set(rendered(MOST)) == {"Deployment", "Service", "ServiceMonitor", "PodDisruptionBudget"}
    assert set(rendered(NO_GPU)) == {"Deployment", "Service", "Secret"}


def test_a_wrong_document_would_be_found() -> None:
    document = rendered(LEAST)["Deployment"]
    document["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
        kubernetes_validate.validate(document, "1.32", strict=True)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"ensemble": {"claim": ""}}, "claim"),
        ({"apiKey": {"value": ""}}, "apiKey"),
        ({"apiKey": {"value": "one", "existingSecret": "another"}}, "apiKey"),
        ({"ensemble": {"claim": "models", "subPath": "../other"}}, "subPath"),
        ({"replica": 2}, "replica"),
        ({"sharedMemory": "much"}, "sharedMemory"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "maxUnavailable"),  # no node could be drained
    ],
    ids=str,
)
def test_wrong_values_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmError, match=named):
        rendered({**LEAST, **wrong})


@pytest.mark.parametrize("values", [LEAST, MOST], ids=["least", "most"])
def test_a_pod_has_the_time_that_decar_takes(values: dict[str, Any]) -> None:
    pod, container = container_of(values)
    drain_s = values.get("shutdownTimeoutSeconds", 30)
    assert f"--shutdown-timeout={drain_s}" in container["args"]
    _, asleep_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert int(asleep_s) == values.get("preStopSeconds", 5)
    assert pod["terminationGracePeriodSeconds"] == int(asleep_s) + drain_s + STOPS_S
    for probe, at_least_s in (("startupProbe", "startSeconds"), ("livenessProbe", "liveSeconds")):
        found = container[probe]
        assert found["httpGet"] == {"path": "/health", "port": "http"}
        given_s = values.get(at_least_s, {"startSeconds": 900, "liveSeconds": 600}[at_least_s])
        assert (
            given_s <= found["failureThreshold"] * found["periodSeconds"] < given_s + found["periodSeconds"]
        )
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}


def test_a_pod_has_its_gpus_its_shared_memory_and_its_keys() -> None:
    pod, container = container_of(MOST)
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/mig-1g.10gb"] == 2
    assert not any("nvidia" in name for name in container_of(NO_GPU)[1]["resources"]["limits"])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert volumes["ensemble"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["name"] == "shm"
    assert mounts["/ensemble"] == {
        "name": "ensemble",
        "mountPath": "/ensemble",
        "readOnly": True,
        "subPath": "demo/v2",
    }
    keys = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"]
        for entry in container["env"]
        if "valueFrom" in entry
    }
    assert keys == {
        "VLLM_API_KEY": {"name": "keys", "key": "user"},
        "DECAR_ADMIN_KEY": {"name": "keys", "key": "admin"},
    }
    user = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert pod["securityContext"]["runAsUser"] == int(user[1])


def compose() -> str:
    """compose.yaml as with the variables that it needs."""
    text = (ROOT / "compose.yaml").read_text()
    given = {"DECAR_ENSEMBLE": "/models/demo", "DECAR_API_KEY": "secret", "DECAR_ADMIN_KEY": ""}
    assert set(re.findall(r"\$\{(\w+)", text)) == set(given)
    return re.sub(r"\$\{(\w+)[^}]*\}", lambda found: given[found[1]], text)


def test_compose_is_valid_and_gives_decar_the_time_it_takes() -> None:
    PyCompose.from_yaml(compose())
    decar = yaml.safe_load(compose())["services"]["decar"]
    timeout_s = dict(pairwise(decar["command"]))["--shutdown-timeout"]
    assert decar["stop_grace_period"] == f"{int(timeout_s) + STOPS_S + 5}s"
    assert decar["shm_size"]
    [ensemble] = [volume for volume in decar["volumes"] if isinstance(volume, dict)]
    assert ensemble["read_only"]
    assert ensemble["target"] == decar["command"][0] == "/ensemble"
    assert decar["healthcheck"]["test"][-1].endswith("/health")


def test_what_compose_mounts_is_there() -> None:
    services = yaml.safe_load(compose())["services"].values()
    volumes = [volume for service in services for volume in service["volumes"] if isinstance(volume, str)]
    paths = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert len(paths) >= 5
    assert all((ROOT / path).is_file() for path in paths)


def test_what_is_no_compose_file_is_found() -> None:
    with pytest.raises(ValueError, match="stop_grace"):
        PyCompose.from_yaml(compose().replace("stop_grace_period: 45s", "stop_grace: 45s"))
