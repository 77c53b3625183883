"""Batch scripts for clusters: the same command on every machine, each with its own place among them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pydantic import Field

from llmtrainer.base.part import Config
from llmtrainer.base.text import write_yaml


class Cluster(Config):
    """What a batch script or Job asks for."""

    name: str = Field(default="llmtrainer", pattern=r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$")
    """Of the job: small letters, digits and dashes."""

    gpus: bool = True
    """Ask for one GPU per process."""

    cores: int = Field(default=8, ge=1)
    """Processor cores per process."""

    memory: str | None = Field(default=None, pattern=r"^[0-9]+[KMGT]?$")
    """Of each machine, such as `256G`; not asked for if not given."""

    time: str | None = Field(default=None, pattern=r"^[0-9:-]+$")
    """Slurm: how long the job may last, as `2-00:00:00`. Two minutes before, the run saves and ends."""

    partition: str | None = None
    """Slurm: which part of the cluster."""

    image: str | None = None
    """Kubernetes: the container image, with llmtrainer installed. Required there."""

    claim: str | None = None
    """Kubernetes: the PersistentVolumeClaim that is mounted at `folder`, and holds data and run directory."""

    folder: str = "/data"
    """Kubernetes: where the claim is mounted, and the command starts."""


GRACE_SECONDS = 120
"""Between the request to stop and the end: a step and a checkpoint have to fit."""
PORT = 29400


def slurm_script(cluster: Cluster, nnodes: int, nproc: int, command: Sequence[str]) -> str:
    """A script for `sbatch`: one task a machine, which launches that machine's processes."""
    asked = [
        f"--job-name={cluster.name}", f"--nodes={nnodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={cluster.cores * nproc}", "--output=%x-%j.log", "--open-mode=append",
        # Without the B: before it, the signal goes to the tasks and not to this script alone.
        f"--signal=TERM@{GRACE_SECONDS}",
    ]  # fmt: skip
    if cluster.gpus:
        asked.append(f"--gpus-per-node={nproc}")
    for option, value in (("mem", cluster.memory), ("time", cluster.time), ("partition", cluster.partition)):
        if value is not None:
            asked.append(f"--{option}={value}")
    words = shlex.join(command)
    return "\n".join([
        "#!/bin/bash", *(f"#SBATCH {option}" for option in asked), "set -euo pipefail", "",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        "port=$((20000 + SLURM_JOB_ID % 20000))    # two jobs on one machine do not meet",
        "",
        "# Exit code 3: stopped on request or at the end of its time, with a full checkpoint; submit it again, and",
        "# the run continues. Exit code 2: the log says what has to be mended first.",
        'export RENDEZVOUS="$first:$port"',
        "srun --kill-on-bad-exit=1 bash -c 'exec llmtrainer launch \\",
        f'  --nproc {nproc} --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rendezvous "$RENDEZVOUS" \\',
        "  \"$@\"' launch " + words,
    ])  # fmt: skip


def kubernetes_job(cluster: Cluster, nnodes: int, nproc: int, command: Sequence[str]) -> str:
    """An indexed Job, one pod a machine, and the headless Service by which they find the first."""
    from llmtrainer.base.errors import UserError

    if cluster.image is None:
        raise UserError(
            "a Job needs a container image", where="cluster.image",
            fix="cluster.image=registry.example/llmtrainer:0.1.0",
        )
    name = cluster.name
    first = f"{name}-0.{name}:{PORT}"
    place = [] if nnodes == 1 else [
        "--nnodes", str(nnodes), "--node-rank", "$(JOB_COMPLETION_INDEX)", "--rendezvous", first,
    ]  # fmt: skip
    amounts: dict[str, object] = {"cpu": str(cluster.cores * nproc)}
    if cluster.memory is not None:
        amounts["memory"] = f"{cluster.memory}i" if cluster.memory[-1] in "KMGT" else cluster.memory
    if cluster.gpus:
        amounts["nvidia.com/gpu"] = str(nproc)
    # torch's loaders and NCCL share memory there, and a container's default is 64 MiB.
    volumes: list[dict[str, object]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if cluster.claim is not None:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": cluster.claim}})
        mounts.append({"name": "data", "mountPath": cluster.folder})
    container: dict[str, object] = {
        "name": "train", "image": cluster.image, "workingDir": cluster.folder,
        "command": ["llmtrainer", "launch", "--nproc", str(nproc), *place, *command],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)}, "volumeMounts": mounts,
        "ports": [{"containerPort": PORT}],
    }  # fmt: skip
    pod = {
        "metadata": {"labels": {"app": name}},
        "spec": {
            "subdomain": name, "restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_SECONDS,
            "containers": [container], "volumes": volumes,
        },
    }  # fmt: skip
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed", "completions": nnodes, "parallelism": nnodes,
            # A pod that crashed is started again and continues; code 2 has to be mended first, 3 was asked for.
            "backoffLimit": 10 * nnodes,
            "podFailurePolicy": {"rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 3]}},
            ]},
            "template": pod,
        },
    }  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {
            "clusterIP": "None", "selector": {"app": name}, "publishNotReadyAddresses": True,
            "ports": [{"port": PORT}],
        },
    }  # fmt: skip
    return f"{write_yaml(service)}---\n{write_yaml(job)}".rstrip("\n")
