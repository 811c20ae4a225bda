"""examples/: the fields that each scheduler knows, and commands of launchers that exist, with flags that they take."""

import re
import shlex
from pathlib import Path

import pytest
import yaml  # timm needs it

import main_pretrain

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").iterdir())
ANY = None  # any value
VOLUME = {"name": ANY, "persistentVolumeClaim": {"claimName": ANY}, "emptyDir": {"medium": ANY, "sizeLimit": ANY}}
CONTAINER = {"name": ANY, "image": ANY, "workingDir": ANY, "command": ANY, "env": [{"name": ANY, "value": ANY}],
             "resources": {"limits": ANY}, "volumeMounts": [{"name": ANY, "mountPath": ANY}]}  # fmt: skip
REPLICA = {"replicas": ANY, "restartPolicy": ANY, "template": {"spec": {"containers": [CONTAINER], "volumes": [VOLUME]}}}
FIELDS = {  # those that are used, of the fields in each tool's own schema (docs/clusters.md)
    "pytorchjob.yaml": {
        "apiVersion": ANY, "kind": ANY, "metadata": {"name": ANY},
        "spec": {"nprocPerNode": ANY, "runPolicy": {"cleanPodPolicy": ANY, "backoffLimit": ANY},
                 "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA}},
    },
    "skypilot.yaml": {
        "name": ANY, "resources": {"accelerators": ANY, "use_spot": ANY, "disk_size": ANY}, "num_nodes": ANY, "workdir": ANY,
        "envs": {"MIRROR": ANY, "SHARDS": ANY}, "setup": ANY, "run": ANY,
    },
}  # fmt: skip


def unknown(value, fields, path=""):
    """The paths of fields that are not in `fields`."""
    if isinstance(fields, dict):
        assert isinstance(value, dict), path
        return [found for name in value for found in
                (unknown(value[name], fields[name], f"{path}.{name}") if name in fields else [f"{path}.{name}"])]  # fmt: skip
    return [found for one in value for found in unknown(one, fields[0], path)] if isinstance(fields, list) else []


@pytest.mark.parametrize("name", FIELDS)
def test_examples__have_known_fields_only(name):
    content = yaml.safe_load((ROOT / "examples" / name).read_text())
    assert unknown(content, FIELDS[name]) == []
    assert unknown(content | {"nam": 1}, FIELDS[name]) == [".nam"]


def test_pytorchjob__the_operator_finds_its_container_and_all_pods_are_alike():
    job = yaml.safe_load((ROOT / "examples/pytorchjob.yaml").read_text())
    replicas, spec = job["spec"]["pytorchReplicaSpecs"], job["spec"]
    assert replicas["Master"] == replicas["Worker"] and replicas["Master"]["replicas"] == 1  # one master, as the operator asks
    pod = replicas["Master"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch" and isinstance(spec["nprocPerNode"], str)  # a number is refused
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(variable["value"], str) for variable in container["env"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples__start_a_launcher_with_flags_that_it_takes(path):
    text = path.read_text()
    assert 20 <= text.count("\n") <= 42 and f"examples/{path.name}" in text
    if path.suffix == ".yaml":
        command = yaml.safe_load(text)
        if "run" in command:
            words = shlex.split(re.search("^bash .*", command["run"], re.MULTILINE)[0])
        else:
            words = command["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"]
        bash, launcher, *flags = words
        assert bash == "bash" and (ROOT / launcher).exists()
        main_pretrain.get_args(["--shards", "x", *flags])
