"""The ready-made files of cluster/: what Ray and Kubernetes check of them, and that what they run can be run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stdist.runs.recipes import load_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
IMAGE_ROOT = "/home/ray/stdist/"
"""Where the image has the repository's folders."""
FILES = ["aws.yaml", "onprem.yaml", "kuberay_cluster.yaml", "kuberay_job.yaml", "slurm.sh"]


def commands(text: str) -> Iterator[list[str]]:
    """Configuration and key=value of every training that a file starts or says how to start."""
    for line in re.findall(r"(?:stdist (?:submit|train)|sbatch cluster/slurm\.sh) ([^`\n]*configs/[^`\n]*)", text):
        words = shlex.split(line)
        yield [words[0].removeprefix(IMAGE_ROOT), *(word for word in words[1:] if re.match(r"[a-z_0-9.]+=", word))]


@pytest.mark.parametrize(
    "path", [*(CLUSTER / name for name in FILES), ROOT / "docs" / "cluster.md"], ids=lambda p: p.name
)
def test_the_trainings_they_start_are_valid(path):
    found = list(commands(path.read_text()))
    assert found
    for config, *overrides in found:
        learners = load_config(ROOT / config, overrides).learners
        assert learners.num_workers == 1 or learners.engine == "deepspeed"


@pytest.mark.parametrize("name", FILES)
def test_they_say_how_to_start_them(name):
    header = re.match(r"(#.*\n)+", (CLUSTER / name).read_text()).group()
    assert f"cluster/{name}" in header


@pytest.mark.parametrize("name", ["aws.yaml", "onprem.yaml"])
def test_ray_up_takes_them(name):
    util = pytest.importorskip("ray.autoscaler._private.util", reason="Ray: pip install 'stdist[cluster]'")
    config = util.prepare_config(yaml.safe_load((CLUSTER / name).read_text()))
    util.validate_config(config)
    assert all("RAY_AUTH_MODE=token" in config[f"{node}_start_ray_commands"][-1] for node in ("head", "worker"))
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    types = config["available_node_types"].values()
    assert sum(kind.get("max_workers", 0) for kind in types) >= 2


def test_every_machine_has_the_ray_of_the_constraints():
    version = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert f"\nFROM rayproject/ray:{version}-" in (CLUSTER / "Dockerfile").read_text()
    assert all(cluster["rayVersion"] == version for cluster in ray_clusters())


def test_the_image_is_made_of_what_there_is():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    sources = [
        word for line in re.findall(r"^COPY --\S+ (.*)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert {"stdist", "data_prep", "configs", "pyproject.toml"} <= set(sources)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert all((ROOT / source).exists() and f"!{source}" in ignored for source in sources)
    assert f"WORKDIR {IMAGE_ROOT.rstrip('/')}\n" in dockerfile
    extras = re.search(r"'\.\[(.*)\]'", dockerfile).group(1).split(",")
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_clusters() -> list[dict[str, Any]]:
    return [manifest("kuberay_cluster.yaml")["spec"], manifest("kuberay_job.yaml")["spec"]["rayClusterSpec"]]


def test_kuberay_resources_have_the_fields_of_their_definitions():
    """Names and required fields as in KubeRay 1.6's custom resource definitions, which refuse others."""
    cluster, job = manifest("kuberay_cluster.yaml"), manifest("kuberay_job.yaml")
    for resource, kind in ((cluster, "RayCluster"), (job, "RayJob")):
        assert (resource["apiVersion"], resource["kind"]) == ("ray.io/v1", kind)
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", resource["metadata"]["name"])
    fields = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    assert set(job["spec"]) <= fields
    for spec in ray_clusters():
        assert set(spec) <= {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
        assert spec["authOptions"] == {"mode": "token"}
        assert set(spec["headGroupSpec"]) == {"rayStartParams", "template"}
        for group in spec["workerGroupSpecs"]:
            assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_both_ways_to_kubernetes_make_the_same_cluster():
    cluster, job = ray_clusters()
    assert cluster == job


def test_every_pod_mounts_the_shared_volume_and_workers_have_the_gpus_that_learners_ask_for():
    volume = manifest("kuberay_volume.yaml")
    assert volume["kind"] == "PersistentVolumeClaim" and volume["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = ray_clusters()[0]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {item["name"]: item for item in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    (workers,) = cluster["workerGroupSpecs"]
    per_pod = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    ((config, *overrides),) = commands(manifest("kuberay_job.yaml")["spec"]["entrypoint"])
    assert load_config(ROOT / config, overrides).learners.num_workers == workers["replicas"] * per_pod
