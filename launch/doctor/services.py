"""Checks of the services that a job uses: Ray, an object store, the model hub and wandb."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import os
import secrets
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from data_sharding.common.errors import RequestError, one_line, show
from data_sharding.common.storage import as_path, describe, is_remote, is_storage_error, put
from data_sharding.job.cluster import ClusterFailed, RayConfig, ray_session
from launch.doctor.finding import Finding
from launch.doctor.machine import judge_skew

NODE_S = 120.0
"""Time limit in seconds for a machine of the Ray cluster to run a small task."""
HUB_S = 10.0
"""Time limit in seconds for the model hub to answer."""
STORE_BYTES = 8 * 2**20


def _describe_machine() -> tuple[str, str, str]:
    """Return the name of this machine, and its versions of Python and Dreamscale."""
    import platform
    from importlib import metadata

    return platform.node(), platform.python_version(), metadata.version("dreamscale")


def check_ray(config: RayConfig) -> Finding:
    """Start Ray, or connect to a cluster, and run a small task on each machine."""
    # A cluster of this machine needs only one worker for the check.
    config = dataclasses.replace(config, num_cpus=config.num_cpus or 1)
    start = time.monotonic()
    try:
        with ray_session(config):
            import ray
            from ray.exceptions import RayError
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            task = ray.remote(max_retries=0, num_cpus=0)(_describe_machine)
            nodes = [node for node in ray.nodes() if node["Alive"]]
            asked = [
                task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
                for node in nodes
            ]
            failed = []
            versions = {_describe_machine()[1:]}
            for node, reference in zip(nodes, asked, strict=True):
                try:
                    versions.add(ray.get(reference, timeout=NODE_S)[1:])
                except RayError as error:
                    failed.append(f"{node['NodeManagerAddress']}: {show(one_line(error), 150)}")
    except (RequestError, ClusterFailed) as error:
        advice = "look into the logs that the message names; check memory, free ports, and ray.address"
        return Finding(what="Ray", state="fails", found=one_line(error), advice=advice)
    if failed:
        advice = "install the same Dreamscale at the same path on every machine of the cluster"
        return Finding(what="Ray", state="fails", found=f"no answer from {'; '.join(failed)}", advice=advice)
    if len(versions) > 1:
        found = "; ".join(f"Python {python}, Dreamscale {own}" for python, own in sorted(versions))
        advice = "install the same versions on every machine of the cluster"
        return Finding(what="Ray", state="fails", found=f"versions differ: {found}", advice=advice)
    took = time.monotonic() - start
    machines = f"{len(nodes)} {'machine' if len(nodes) == 1 else 'machines'}"
    return Finding(what="Ray", state="ok", found=f"a task ran on {machines}; start and end took {took:.0f} s")


def check_store(address: str) -> list[Finding]:
    """Write, list, read and delete an object in a folder or an object store."""
    try:
        folder = as_path(address)
    except RequestError as error:
        return [Finding(what="store", state="fails", found=str(error), advice="correct --store")]
    target = folder / f"dreamscale-doctor-{secrets.token_hex(6)}.bin"
    content = secrets.token_bytes(STORE_BYTES)
    step, seconds = "write", []
    try:
        with tempfile.NamedTemporaryFile() as local:
            Path(local.name).write_bytes(content)
            before = time.time()
            start = time.monotonic()
            put(Path(local.name), target)
            seconds.append(time.monotonic() - start)
            after = time.time()
        try:
            step = "list"
            listed = target.name in [path.name for path in folder.iterdir()]
            step = "read"
            start = time.monotonic()
            same = target.read_bytes() == content
            seconds.append(time.monotonic() - start)
            step = "look at"
            written = _modified(target)
        finally:
            step = "delete" if step == "look at" else step
            target.unlink()
    except Exception as error:
        if not is_storage_error(error):
            raise
        advice = "check the address, the network and the keys, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"
        found = f"{show(address)}: could not {step} an object: {show(describe(error), 300)}"
        return [Finding(what="store", state="fails", found=found, advice=advice)]
    if not listed or not same:
        fault = "its list does not show" if not listed else "it returns other bytes for"
        found = f"{show(address)}: {fault} an object that was just written"
        return [Finding(what="store", state="fails", found=found, advice="ask the administrator of the store")]
    speed = [STORE_BYTES / 1e6 / max(one, 1e-6) for one in seconds]
    found = f"{show(address)}: written, listed, read and deleted; {speed[0]:.0f} MB/s up, {speed[1]:.0f} MB/s down"
    findings = [Finding(what="store", state="ok", found=found)]
    if written is not None:
        # Object stores give times in whole seconds.
        skew = max(before - 1 - written, written - after, 0.0)
        findings.append(judge_skew("clock of the store", skew, f"{show(address)} and this machine differ by"))
    return findings


def _modified(target: object) -> float | None:
    """Return the time at which a file server or an object store says that it stored a file."""
    path = as_path(target)  # type: ignore[arg-type]
    if not is_remote(path):
        return path.stat().st_mtime
    details = path.fs.info(path.path)  # type: ignore[union-attr]
    found = details.get("LastModified") or details.get("mtime") or details.get("updated")
    return found.timestamp() if isinstance(found, datetime.datetime) else None


def check_hub() -> Finding:
    """Check the log-in at the model hub (Hugging Face)."""
    what = "model hub"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        advice = "models must be in local folders or in the cache (HF_HOME)"
        return Finding(what=what, state="note", found="HF_HUB_OFFLINE is set", advice=advice)
    from huggingface_hub import constants, get_token

    token = get_token()
    if token is None:
        advice = "needed only for models that ask for it: hf auth login, or set HF_TOKEN"
        return Finding(what=what, state="note", found="not logged in", advice=advice)
    address = f"{os.environ.get('HF_ENDPOINT') or constants.ENDPOINT}/api/whoami-v2"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=HUB_S):
            return Finding(what=what, state="ok", found="logged in")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return _unreachable(f"the hub answered with status {error.code}")
        advice = "make a new token, and run hf auth login or set HF_TOKEN"
        return Finding(what=what, state="fails", found=f"the hub refused the token ({error.code})", advice=advice)
    except OSError as error:
        return _unreachable(f"the hub cannot be reached: {show(one_line(error), 150)}")


def _unreachable(found: str) -> Finding:
    advice = "copy models to local folders, and set HF_HUB_OFFLINE=1"
    return Finding(what="model hub", state="note", found=found, advice=advice)


def check_wandb() -> Finding:
    """Check the log-in at wandb."""
    if importlib.util.find_spec("wandb") is None:
        return Finding(
            what="wandb", state="note", found="not installed", advice="pip install wandb, or set tracker.kind: none"
        )
    from pretrain.runs.tracking import logged_in

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        found = f"WANDB_MODE is {os.environ['WANDB_MODE']}"
        return Finding(what="wandb", state="note", found=found, advice="send runs later with 'wandb sync'")
    if logged_in():
        return Finding(what="wandb", state="ok", found="logged in")
    return Finding(
        what="wandb",
        state="note",
        found="not logged in: runs are recorded offline",
        advice="wandb login, or set WANDB_API_KEY, or send runs later with 'wandb sync'",
    )
