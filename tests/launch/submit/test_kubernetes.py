"""Tests of jobs on Kubernetes: manifests follow the published schemas, and say what the options ask for."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from launch.cli import main

PRETRAIN = str(Path(__file__).resolve().parents[3] / "configs" / "demo" / "pretrain.yaml")
VERSIONS = ["1.26", "1.29", "1.31", "1.33", "1.35", "1.37"]
"""Versions of Kubernetes whose schemas the tests use."""
KINDS = ["job", "jobset", "trainjob"]
MODELS: dict[str, Any] = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
EVERYTHING = [
    *("--directory", "/data/a lab's", "--memory", "200Gi", "--shared-memory", "32Gi", "--pod-cpus", "7.5"),
    *("--env", "NCCL_DEBUG=INFO", "--env", "TEXT=a $(HOME) $$ b: c", "--secret", "hub", "--secret", "store"),
    *("--toleration", "nvidia.com/gpu", "--toleration", "team=eeg:NoSchedule", "--node-selector", "gpu.product=H200"),
    *("--service-account", "trainer", "--pull-secret", "registry", "--user", "1000:1000"),
    *("--gpu-resource", "amd.com/gpu"),
    *("--label", "kueue.x-k8s.io/queue-name=lab", "--namespace", "eeg", "--claim", "eeg.data", "--name", "null"),
]  # fmt: skip


def render(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    words = ("--gpus-per-node", "2", *words)
    assert main(["submit", "k8s", "pretrain", PRETRAIN, "--dry-run", *words]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def find_job(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the spec of the Job that runs the pods."""
    spec = next(one["spec"] for one in documents if one["kind"] in ("Job", "JobSet", "TrainingRuntime"))
    spec = spec["template"]["spec"] if "mlPolicy" in spec else spec
    return spec["replicatedJobs"][0]["template"]["spec"] if "replicatedJobs" in spec else spec


def check_keys(document: dict[str, Any]) -> None:
    """Check a custom object against the published models, which ignore unknown keys by themselves."""
    known = MODELS[document["kind"]].from_dict(copy.deepcopy(document)).to_dict()
    assert known == document, "a key is unknown"


@pytest.mark.parametrize("words", [[], EVERYTHING], ids=["default", "everything"])
@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("kind", KINDS)
def test_manifests_follow_the_schemas(kind: str, nodes: str, words: list[str], capsys: pytest.CaptureFixture[str]):
    documents = render(capsys, "--kind", kind, "--nodes", nodes, *words)
    kinds = {"job": ["Service", "Job"] if nodes == "2" else ["Job"], "jobset": ["JobSet"]}
    assert [one["kind"] for one in documents] == kinds.get(kind, ["TrainingRuntime", "TrainJob"])
    core = [one for one in documents if one["kind"] not in MODELS]
    if kind != "job":
        for one in documents:
            check_keys(one)
        core = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": find_job(documents)}]
    for version in VERSIONS:
        for one in core:
            kubernetes_validate.validate(one, version, strict=True)


def test_the_checks_find_faults(capsys: pytest.CaptureFixture[str]):
    (job,) = render(capsys)
    del job["spec"]["podFailurePolicy"]["rules"][2]["onPodConditions"][0]["status"]
    with pytest.raises(kubernetes_validate.ValidationError, match="status"):
        kubernetes_validate.validate(job, "1.31", strict=True)
    (jobs,) = render(capsys, "--kind", "jobset")
    jobs["spec"]["replicatedJobs"][0]["replicated"] = 1
    with pytest.raises(AssertionError, match="unknown"):
        check_keys(jobs)


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes(kind: str, capsys: pytest.CaptureFixture[str]):
    """Exit code 75 is no failure, exit code 2 ends the job, and other failures are counted."""
    documents = render(capsys, "--kind", kind, "--nodes", "2")
    job = find_job(documents)
    name = job["template"]["spec"]["containers"][0]["name"]
    stopped, refused, *others = job["podFailurePolicy"]["rules"]
    for rule, action, code in ((stopped, "Ignore", 75), (refused, "FailJob", 2)):
        assert rule["action"] == action
        assert rule["onExitCodes"] == {"containerName": name, "operator": "In", "values": [code]}
    if kind == "job":
        assert [rule["action"] for rule in others] == ["Ignore"] and job["backoffLimit"] == 6
        return
    # The first failure of a pod ends the Job, so that all pods start again together.
    assert not others and job["backoffLimit"] == 0
    jobs = documents[0]["spec"] if kind == "jobset" else documents[0]["spec"]["template"]["spec"]
    (rule,) = jobs["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobs["failurePolicy"]["maxRestarts"] == 3


def test_options_reach_the_pods(capsys: pytest.CaptureFixture[str]):
    service, job = render(capsys, "--nodes", "2", *EVERYTHING)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["workingDir"] == "/data/a lab's"
    assert container["resources"] == {
        "requests": {"cpu": "7500m", "memory": "200Gi"},
        "limits": {"memory": "200Gi", "amd.com/gpu": 2},
    }
    values = {one["name"]: one.get("value", "") for one in container["env"]}
    # Kubernetes replaces $$ by $, and $(NAME) by a variable.
    assert re.sub(r"\$\$", "$", values["TEXT"]) == "a $(HOME) $$ b: c" and "$(" not in values["TEXT"].replace("$$", "")
    assert values["NCCL_DEBUG"] == "INFO" and values["HEAD_NODE"] == "null-0.null"
    assert [one["secretRef"]["name"] for one in container["envFrom"]] == ["hub", "store"]
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists"},
        {"key": "team", "operator": "Equal", "value": "eeg", "effect": "NoSchedule"},
    ]
    assert pod["nodeSelector"] == {"gpu.product": "H200"}
    assert pod["serviceAccountName"] == "trainer" and pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "eeg.data"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lab"
    # The service finds the pods by their label.
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert service["metadata"] == {"name": "null", "namespace": "eeg"} and pod["subdomain"] == "null"


def test_a_pod_asks_for_less_than_a_machine(capsys: pytest.CaptureFixture[str]):
    (job,) = render(capsys, "--cpus-per-node", "4")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "3500m"}
    assert container["workingDir"] == "/data" == container["volumeMounts"][0]["mountPath"]
    assert job["spec"]["template"]["spec"]["volumes"][1]["emptyDir"]["sizeLimit"] == "16Gi"
    (job,) = render(capsys, "--memory", "8Gi")
    assert job["spec"]["template"]["spec"]["volumes"][1]["emptyDir"]["sizeLimit"] == str(4 * 2**30)


def test_jobs_have_names_of_their_own(capsys: pytest.CaptureFixture[str]):
    first, second = (render(capsys)[0]["metadata"]["name"] for _ in range(2))
    assert first != second and first.startswith("dreamscale-pretrain-")


def test_a_submitted_job_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "kubectl").write_text(
        f'#!/bin/sh\necho "$@" >"{tmp_path}/words"\ncat >"{tmp_path}/job"\necho created\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["submit", "k8s", "pretrain", PRETRAIN, "--gpus-per-node", "1", "--nodes", "2", "--namespace", "eeg"]
    assert main(words) == 0
    output = capsys.readouterr()
    name = output.out.strip()
    # 'create' refuses a job whose name exists; 'apply' would try to change the old job.
    assert (tmp_path / "words").read_text() == "create -f -\n"
    service, job = yaml.safe_load_all((tmp_path / "job").read_text())
    assert service["metadata"]["name"] == job["metadata"]["name"] == name
    assert f"kubectl --namespace eeg delete job,service {name} " in output.err
    assert f"logs --follow --prefix --max-log-requests 2 --selector dreamscale-job={name} " in output.err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--directory", "/home/me"], "not inside mount"),
        (["--directory", "/data/../home"], "not inside mount"),
        (["--directory", "runs"], "not inside mount"),
        (["--mount", "data"], "absolute path"),
        (["--memory", "200"], "200Gi"),
        (["--memory", "8Gi", "--shared-memory", "8G", "--directory", "/data"], None),
        (["--memory", "8Gi", "--shared-memory", "8Gi"], "must be below memory"),
        (["--pod-cpus", "0"], "pod_cpus"),
        (["--pod-cpus", "nan"], "pod_cpus"),
        (["--env", "A"], "KEY=VALUE"),
        (["--env", "1A=b"], "1A"),
        (["--env", "NODE_INDEX=1"], "sets this variable itself"),
        (["--toleration", "a=b:Never"], "NoSchedule"),
        (["--toleration", "=b"], "toleration"),
        (["--node-selector", "gpu"], "KEY=VALUE"),
        (["--label", "a b=c"], "label"),
        (["--secret", "My_Secret"], "secret"),
        (["--claim", ""], "claim"),
        (["--user", "me"], "UID"),
        (["--gpu-resource", "gpu"], "DOMAIN/NAME"),
        (["--namespace", "Lab"], "namespace"),
        (["--name", "1e3"], "letter"),
        (["--name", "a" * 46], "45 characters"),
        (["--kind", "pod"], "kind"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(
    words: list[str], names: str | None, capsys: pytest.CaptureFixture[str]
):
    code = main(["submit", "k8s", "pretrain", PRETRAIN, "--gpus-per-node", "1", "--dry-run", *words])
    error = capsys.readouterr().err
    assert code == (0 if names is None else 2)
    assert names is None or (names in error and error.count("\n") == 1)
