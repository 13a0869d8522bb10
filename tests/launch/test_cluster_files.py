"""Tests of the files that start Ray clusters: Ray and KubeRay know every key, and Kubernetes accepts the pods."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.stages import STAGES

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cluster"
VERSIONS = ["1.29", "1.33", "1.37"]
"""Versions of Kubernetes whose schemas the tests use."""
KEYS: dict[str, dict[str, bool]] = {
    "RayJob": {
        "entrypoint": False,
        "runtimeEnvYAML": False,
        "backoffLimit": False,
        "shutdownAfterJobFinishes": False,
        "rayClusterSpec": True,
    },
    "RayCluster": {"rayVersion": False, "headGroupSpec": True, "workerGroupSpecs": True},
    "head": {"rayStartParams": True, "template": True},
    "workers": {
        "groupName": True,
        "replicas": False,
        "minReplicas": True,
        "maxReplicas": True,
        "rayStartParams": True,
        "template": True,
    },
}
"""Keys of KubeRay's API ray.io/v1 that the manifests may use, and whether each is required."""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["ray_on_premise", "ray_aws"])
def test_cluster_files_follow_the_schema_of_ray(name: str) -> None:
    import jsonschema
    import ray

    values = read(name)
    jsonschema.validate(values, json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text()))
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in values[key]:
            assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0


def check_keys(kind: str, values: dict[str, Any]) -> None:
    assert set(values) <= set(KEYS[kind]), kind
    assert {key for key, required in KEYS[kind].items() if required} <= set(values), kind


def list_groups(name: str) -> list[dict[str, Any]]:
    """Check the keys of a manifest of KubeRay, and return its groups of pods; the first group is the head."""
    document = read(name)
    assert document["apiVersion"] == "ray.io/v1"
    check_keys(document["kind"], document["spec"])
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    check_keys("RayCluster", cluster)
    check_keys("head", cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        check_keys("workers", group)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("name", ["kuberay_job", "kuberay_cluster"])
def test_manifests_have_the_keys_of_kuberay(name: str) -> None:
    head, workers = list_groups(name)
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, workers):
        # KubeRay reads only texts here.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert "command" not in container, "KubeRay itself starts Ray"
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers["rayStartParams"]["num-gpus"] == str(limits["nvidia.com/gpu"])


@pytest.mark.parametrize("name", ["kuberay_job", "kuberay_cluster"])
def test_kubernetes_accepts_the_pods(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for group in list_groups(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": group["template"]["spec"]}
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)


def test_the_entrypoint_is_a_command_of_this_version() -> None:
    spec = read("kuberay_job")["spec"]
    shell, option, command = shlex.split(spec["entrypoint"])
    assert (shell, option) == ("bash", "-c")
    _, _, words = command.partition("-m launch.ray_train ")
    nodes, gpus = words.split()[1:4:2]
    assert STAGES[words.split()[4]].launcher
    assert words.split()[-2:] == ["--num_processes", str(int(nodes) * int(gpus))]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "150"}}
