"""Options of a job on Kubernetes, its manifests, and the commands with which a user follows the job.

A job has one pod for each machine. Three kinds of objects can run the pods: a Job, which every cluster knows, a JobSet,
or a TrainJob of Kubeflow. If one pod of a JobSet or TrainJob fails, all pods start again together.
"""

from __future__ import annotations

import posixpath
import re
import secrets
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

import yaml

from data_sharding.common.errors import EXIT_BAD_REQUEST, EXIT_STOPPED, show
from launch.submit.values import check_plain, check_printable

RESTARTS = 3
"""Number of failures of each machine after which the job has failed."""
PORT = 29500
"""Port at which the processes of a training find each other. Each pod has an address of its own."""
OWN_VARIABLES = ("HEAD_NODE", "PORT", "NODE_INDEX")
"""Variables that the manifest itself sets."""
POD_LABEL = "dreamscale-job"
"""Label of all pods of a job; its value is the name of the job."""
_CONTAINER = "node"
_SHARED_MEMORY_GIB = 16
# A pod of a JobSet is called NAME-node-0-INDEX-RANDOM, and the name of a pod has at most 63 characters.
_LONGEST_NAME = 45
_UNITS = {"": 1, **{f"{unit}i": 1024**power for power, unit in enumerate("KMGTP", 1)}}
_UNITS |= {unit: 1000**power for power, unit in enumerate("kMGTP", 1)}
_HEADER = """\
# 'dreamscale submit k8s' writes this job file for Kubernetes. The job has one pod for each machine. If Kubernetes asks
# a pod to stop, the pod writes a checkpoint and ends with exit code 75. Kubernetes does not count exit code 75 as a
# failure, and starts the pod again, and the run resumes. Exit code 2 (a wrong request) ends the job.
"""


@dataclass(kw_only=True)
class KubernetesOptions:
    """Options for Kubernetes."""

    kind: Literal["job", "jobset", "trainjob"] = "job"
    """Kubernetes: object that runs the pods. Every cluster has job. With jobset (needs JobSet 0.6 or newer) or trainjob
    (needs Kubeflow Trainer 2), all pods start again together if one of them fails."""
    image: str = "dreamscale:latest"
    """Kubernetes: container image with Dreamscale installed."""
    pull_secret: str = ""
    """Kubernetes: secret with which the image is pulled from a private registry."""
    namespace: str = "default"
    """Kubernetes: namespace of the job."""
    claim: str = "dreamscale-data"
    """Kubernetes: persistent volume claim that holds data, configs and runs."""
    mount: str = "/data"
    """Kubernetes: folder at which the claim is mounted. The job runs in this folder, or in --directory inside it."""
    pod_cpus: float | None = None
    """Kubernetes: CPU cores that each pod asks for; by default seven eighths of cpus_per_node, because Kubernetes keeps
    a part of each machine for itself. A pod may use more cores if they are free."""
    memory: str = ""
    """Kubernetes: memory of each pod, such as 200Gi. A pod that uses more memory is killed. By default, the cluster
    decides."""
    shared_memory: str = ""
    """Kubernetes: largest size of /dev/shm, which counts as memory of the pod; by default half of the memory, or 16Gi
    if no memory is given."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes: name of the cluster's GPUs, such as nvidia.com/gpu or amd.com/gpu."""
    env: list[str] = field(default_factory=list)
    """Kubernetes: environment variable of the stage, as KEY=VALUE; may be given several times. Give passwords and
    tokens with --secret, because everybody who can read the job can read its variables."""
    secret: list[str] = field(default_factory=list)
    """Kubernetes: name of a secret whose entries become environment variables, such as AWS_SECRET_ACCESS_KEY, HF_TOKEN
    or WANDB_API_KEY; may be given several times."""
    toleration: list[str] = field(default_factory=list)
    """Kubernetes: taint of machines on which the job may run, as KEY, KEY=VALUE, KEY:EFFECT or KEY=VALUE:EFFECT, such
    as nvidia.com/gpu:NoSchedule; may be given several times."""
    node_selector: list[str] = field(default_factory=list)
    """Kubernetes: label that a machine must have, as KEY=VALUE, such as nvidia.com/gpu.product=NVIDIA-H200; may be
    given several times."""
    label: list[str] = field(default_factory=list)
    """Kubernetes: label of the job, as KEY=VALUE, such as kueue.x-k8s.io/queue-name=lab; may be given several times."""
    service_account: str = ""
    """Kubernetes: service account of the pods; by default the namespace's default account."""
    user: str = ""
    """Kubernetes: number of the user and of the group that run the stage, as UID or UID:GID; by default the user of the
    image. Files that the job writes belong to this user."""

    def check_kubernetes(self, directory: str) -> None:
        """Check the options.

        Parameters
        ----------
        directory : str
            Folder in which the job runs; empty for the folder of the claim.

        Raises
        ------
        ValueError
            If Kubernetes would refuse an option, or an option contradicts another one.
        """
        check_plain("image", self.image)
        check_plain("mount", self.mount)
        _check(self.image, "image", r"\S+", "give the name of an image")
        _check(self.mount, "mount", r"/[^:]+", "give an absolute path without ':'")
        _check(self.namespace, "namespace", _LABEL, _LABEL_ADVICE)
        for key in ("claim", "pull_secret", "service_account"):
            if value := getattr(self, key):
                _check(value, key, _NAME, _NAME_ADVICE)
            elif key == "claim":
                raise ValueError("claim is empty; name the persistent volume claim that holds the data")
        for name in self.secret:
            _check(name, "secret", _NAME, _NAME_ADVICE)
        _check(self.gpu_resource, "gpu_resource", rf"{_NAME}/{_PLAIN_NAME}", "write DOMAIN/NAME, as nvidia.com/gpu")
        for key in ("memory", "shared_memory"):
            if getattr(self, key):
                _count_bytes(key, getattr(self, key))
        if self.memory and self.shared_memory:
            self._check_shared_memory()
        if self.pod_cpus is not None and not 0.001 <= self.pod_cpus < 1e6:
            raise ValueError(f"pod_cpus is {self.pod_cpus:g}; it must be above 0")
        if self.user:
            _check(self.user, "user", r"\d{1,10}(:\d{1,10})?", "write UID or UID:GID, both as numbers")
        self._check_pairs(directory)

    def _check_shared_memory(self) -> None:
        if _count_bytes("shared_memory", self.shared_memory) >= _count_bytes("memory", self.memory):
            raise ValueError(
                f"shared_memory '{self.shared_memory}' must be below memory '{self.memory}', because it is a part of it"
            )

    def _check_pairs(self, directory: str) -> None:
        """Check the options that are lists, and the folder of the job."""
        for text in self.env:
            check_printable("env", text)
            key = _split_pair("env", text)[0]
            _check(key, "env", r"[A-Za-z_][A-Za-z0-9_]*", "the name of a variable has letters, digits and _")
            if key in OWN_VARIABLES:
                raise ValueError(f"env '{key}': the job file sets this variable itself; leave it out")
        for option in ("node_selector", "label"):
            for text in getattr(self, option):
                key, value = _split_pair(option, text)
                _check(key, option, _QUALIFIED, _LABEL_ADVICE)
                _check(value, option, rf"({_PLAIN_NAME})?", _LABEL_ADVICE)
        for text in self.toleration:
            read_toleration(text)
        check_printable("directory", directory)
        inside = posixpath.normpath(directory or self.mount)
        root = posixpath.normpath(self.mount)
        if inside != root and not inside.startswith(f"{root}/"):
            raise ValueError(
                f"directory '{show(directory)}' is not inside mount '{self.mount}'; give a folder on the volume claim, "
                "because no other folder is sure to exist in a pod"
            )

    @property
    def shared_bytes(self) -> str:
        """Largest size of the shared memory, as Kubernetes writes it."""
        if self.shared_memory:
            return self.shared_memory
        return str(_count_bytes("memory", self.memory) // 2) if self.memory else f"{_SHARED_MEMORY_GIB}Gi"


_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_LABEL_ADVICE = "use letters, digits and '-' as Kubernetes allows them"
_NAME = rf"{_LABEL}(\.{_LABEL})*"
_NAME_ADVICE = "use lower-case letters, digits, '-' and '.'"
_PLAIN_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_QUALIFIED = rf"({_NAME}/)?{_PLAIN_NAME}"
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def _check(value: str, key: str, pattern: str, advice: str) -> None:
    if not re.fullmatch(pattern, value):
        raise ValueError(f"{key} '{show(value)}': {advice}")


def _split_pair(option: str, text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"{option} '{show(text)}': write it as KEY=VALUE")
    return key, value


def _count_bytes(key: str, text: str) -> int:
    """Return the number of bytes that a quantity of Kubernetes means."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]i|[kMGTP]|)", text)
    count = int(Decimal(found[1]) * _UNITS[found[2]]) if found else 0
    # Nobody wants a pod with less than a megabyte: 200 means 200 bytes, and not 200 GiB.
    if count < 10**6:
        raise ValueError(f"{key} '{show(text)}': write a size of at least a megabyte with its unit, such as 200Gi")
    return count


def read_toleration(text: str) -> dict[str, str]:
    """Return a toleration of Kubernetes from the option ``--toleration``; raise `ValueError` if it has no meaning."""
    rest, _, effect = text.partition(":")
    key, sign, value = rest.partition("=")
    wrong = effect not in ("", *_EFFECTS) or (":" in text and not effect)
    if wrong or not re.fullmatch(_QUALIFIED, key) or not re.fullmatch(rf"({_PLAIN_NAME})?", value):
        raise ValueError(
            f"toleration '{show(text)}': write KEY, KEY=VALUE, KEY:EFFECT or KEY=VALUE:EFFECT; EFFECT is one of "
            f"{', '.join(_EFFECTS)}"
        )
    toleration = {"key": key, "operator": "Equal" if sign else "Exists"}
    if sign:
        toleration["value"] = value
    return {**toleration, "effect": effect} if effect else toleration


def choose_name(stage: str) -> str:
    """Return a name for a job that no other job has, because Kubernetes refuses a second job of the same name."""
    return f"dreamscale-{stage}-{secrets.token_hex(3)}"


def check_name(name: str) -> None:
    """Raise `ValueError` if Kubernetes would refuse the name of a job, or the names of its pods."""
    if not name[0].isalpha() or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"name '{name}': with Kubernetes, begin with a letter, and use at most {_LONGEST_NAME} characters"
        )


def render_manifests(
    options: KubernetesOptions,
    command: str,
    *,
    name: str,
    nodes: int,
    gpus: int,
    cpus: int,
    threads: int,
    directory: str,
) -> str:
    """Return the manifests of a job as YAML.

    Parameters
    ----------
    options : KubernetesOptions
        Options of the job.
    command : str
        Shell command that each pod runs. It can use the variables HEAD_NODE, PORT and NODE_INDEX, and must start the
        launcher with exec: otherwise only the shell would receive the signals to the pod.
    name : str
        Name of the job.
    nodes, gpus, cpus : int
        Number of pods, GPUs per pod, and CPU cores per machine.
    threads : int
        Threads of each process.
    directory : str
        Folder in which the job runs; empty for the folder of the claim.

    Returns
    -------
    str
        The text.
    """
    head = f"{name}-0.{name}" if options.kind == "job" else f"{name}-node-0-0.{name}"
    pod = _make_pod(options, command, name, head, gpus, cpus, threads, directory)
    metadata = {"name": name, "namespace": options.namespace}
    labels = {"app": "dreamscale", **dict(_split_pair("label", text) for text in options.label)}
    own = {"metadata": {**metadata, "labels": labels}}
    if options.kind == "job":
        job = _make_job(pod, nodes, backoff=RESTARTS * nodes)
        documents = [{"apiVersion": "batch/v1", "kind": "Job", **own, "spec": job}]
        if nodes > 1:
            job["template"]["spec"]["subdomain"] = name
            documents.insert(0, _make_service(metadata, name))
    else:
        jobs = _make_job_set(_make_job(pod, nodes, backoff=0))
        if options.kind == "jobset":
            documents = [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", **own, "spec": jobs}]
        else:
            documents = _make_train_job(own, jobs, nodes)
    body = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=10**6)
    return _HEADER + body


def _make_pod(
    options: KubernetesOptions, command: str, name: str, head: str, gpus: int, cpus: int, threads: int, directory: str
) -> dict[str, Any]:
    """Return the template of the pods."""
    resources: dict[str, dict[str, Any]] = {"requests": {"cpu": _write_cores(options.pod_cpus or cpus * 7 / 8)}}
    if options.memory:
        resources["requests"]["memory"] = options.memory
        resources["limits"] = {"memory": options.memory}
    if gpus:
        resources.setdefault("limits", {})[options.gpu_resource] = gpus
    values = {"HEAD_NODE": head, "PORT": str(PORT), "OMP_NUM_THREADS": str(threads)}
    values |= dict(_split_pair("env", text) for text in options.env)
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": options.image,
        "workingDir": directory or options.mount,
        # Kubernetes replaces $(NAME) by a variable, and $$ by $.
        "command": ["bash", "-c", command.replace("$", "$$")],
        "env": [
            *({"name": key, "value": value.replace("$", "$$")} for key, value in values.items()),
            {"name": "NODE_INDEX", "valueFrom": index},
        ],
        "resources": resources,
        "volumeMounts": [
            {"name": "data", "mountPath": options.mount},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in options.secret]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        # Time for a checkpoint after a request to stop.
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": options.claim}},
            # NCCL and the worker processes of the loader need more shared memory than a pod has by default.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_bytes}},
        ],
    }
    if options.user:
        user, _, group = options.user.partition(":")
        context = {"runAsUser": int(user)}
        if group:
            # The group also owns the volume, if the volume supports this.
            context |= {"runAsGroup": int(group), "fsGroup": int(group)}
            context |= {"fsGroupChangePolicy": "OnRootMismatch"}
        spec["securityContext"] = context
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if options.pull_secret:
        spec["imagePullSecrets"] = [{"name": options.pull_secret}]
    if options.toleration:
        spec["tolerations"] = [read_toleration(text) for text in options.toleration]
    if options.node_selector:
        spec["nodeSelector"] = dict(_split_pair("node_selector", text) for text in options.node_selector)
    return {"metadata": {"labels": {"app": "dreamscale", POD_LABEL: name}}, "spec": spec}


def _write_cores(cores: float) -> str:
    """Return a number of cores as Kubernetes writes it, in thousandths of a core."""
    return str(int(cores)) if cores == int(cores) else f"{round(cores * 1000)}m"


def _make_job(pod: dict[str, Any], nodes: int, backoff: int) -> dict[str, Any]:
    """Return the spec of a Job."""
    rules: list[dict[str, Any]] = []
    for action, code in (("Ignore", EXIT_STOPPED), ("FailJob", EXIT_BAD_REQUEST)):
        codes = {"containerName": _CONTAINER, "operator": "In", "values": [code]}
        # kubectl 1.28 and older refuses a rule without conditions.
        rules.append({"action": action, "onExitCodes": codes, "onPodConditions": []})
    if backoff:
        # The pod was deleted because its machine is needed for another pod, or is lost. In a JobSet, such a pod ends
        # the Job, so that all pods start again together.
        rules.append({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        # If one process dies, every pod ends, and Kubernetes counts one failure for each pod.
        "backoffLimit": backoff,
        "podFailurePolicy": {"rules": rules},
        "template": pod,
    }


def _make_service(metadata: dict[str, str], name: str) -> dict[str, Any]:
    """Return the service through which the pods of a Job find each other."""
    # Pods must find the addresses of other pods before all pods are ready.
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {POD_LABEL: name}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": dict(metadata), "spec": spec}


def _make_job_set(job: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of a JobSet."""
    # A Job fails with the reason PodFailurePolicy only if a pod ended with exit code 2. Any other failure of a pod ends
    # the Job with another reason, and all pods start again.
    rule = {"name": "wrong-request", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "failurePolicy": {"maxRestarts": RESTARTS, "rules": [rule]},
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    }


def _make_train_job(own: dict[str, Any], jobs: dict[str, Any], nodes: int) -> list[dict[str, Any]]:
    """Return a TrainingRuntime, which describes the pods, and the TrainJob that uses it."""
    # Kubeflow looks for the replicated job with this label, and for its container 'node'.
    step = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    jobs["replicatedJobs"][0]["template"] = {"metadata": {"labels": step}, **jobs["replicatedJobs"][0]["template"]}
    version, name = "trainer.kubeflow.org/v1alpha1", own["metadata"]["name"]
    runtime = {"mlPolicy": {"numNodes": nodes}, "template": {"spec": jobs}}
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    return [
        {"apiVersion": version, "kind": "TrainingRuntime", **own, "spec": runtime},
        {
            "apiVersion": version,
            "kind": "TrainJob",
            "metadata": {**own["metadata"], "labels": dict(own["metadata"]["labels"])},
            "spec": {"runtimeRef": reference, "trainer": {"numNodes": nodes}},
        },
    ]


def follow_pods(name: str, options: KubernetesOptions, nodes: int) -> str:
    """Return the lines that tell a user how to follow a job.

    Parameters
    ----------
    name : str
        Name of the job.
    options : KubernetesOptions
        Options of the job.
    nodes : int
        Number of pods.

    Returns
    -------
    str
        The lines.
    """
    base, pods = f"kubectl --namespace {options.namespace}", f"--selector {POD_LABEL}={name}"
    objects = {"job": ["job", *(["service"] if nodes > 1 else [])], "jobset": ["jobset"]}
    kinds = objects.get(options.kind, ["trainjob", "trainingruntime"])
    lines = {
        f"{base} get pods {pods}": "show the state of the pods",
        f"{base} logs --follow --prefix --max-log-requests {nodes} {pods}": "show the logs",
        f"{base} describe {kinds[0]} {name}": "show why no pod starts",
        f"{base} delete {','.join(kinds)} {name}": "stop the job for good; a training first writes a checkpoint",
    }
    rows = [f"  {command}   # {meaning}" for command, meaning in lines.items()]
    return "\n".join([f"dreamscale: submitted the {options.kind} {name} to Kubernetes", *rows])
