"""The files of deploy/ without a cloud: Ray's own validator, schemas of our own, and what one file names of another."""

from __future__ import annotations

import copy
import os
import re
import shlex
import stat
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from mlflow.cli import cli as mlflow_cli
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli
from sweep_fixtures import load_script

from raytrust.cluster.runtime import SLOT

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
STORAGE = "/mnt/raytrust"
TEXTS = {path.name: path.read_text() for path in DEPLOY.iterdir() if path.is_file() and path.name != ".env"}


def load(name: str) -> Any:
    return yaml.safe_load(TEXTS[name])


def text_of(value: Any) -> Iterator[str]:
    """All strings in a document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (str(key), *text_of(item))
    elif isinstance(value, list):
        for item in value:
            yield from text_of(item)
    else:
        yield str(value)


def commands() -> Iterator[list[str]]:
    """The commands in the blocks of the page, as a shell would split them."""
    for block in re.findall(r"^```\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


# ray up


@pytest.fixture(params=["aws.yaml", "gcp.yaml"])
def launcher(request: pytest.FixtureRequest) -> dict[str, Any]:
    config = prepare_config(load(request.param))
    validate_config(config)
    return config


def test_ray_refuses_what_it_does_not_know(launcher: dict[str, Any]) -> None:
    """So that the fixture's validation says something."""
    for change in ({"colour": 1}, {"max_workers": "many"}, {"provider": {}}, {"head_node_type": "tail"}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config({**copy.deepcopy(launcher), **change})


def test_the_head_runs_no_work_and_workers_are_spot_from_zero(launcher: dict[str, Any]) -> None:
    nodes = dict(launcher["available_node_types"])
    head = nodes.pop(launcher["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert "--num-cpus=0" in launcher["head_start_ray_commands"][-1]
    (worker,) = nodes.values()
    assert (worker["min_workers"], worker["max_workers"]) == (0, launcher["max_workers"])
    assert worker["resources"] == {"CPU": 4, "GPU": 1, SLOT: 1}
    assert {"spot", "SPOT"} & set(text_of(worker["node_config"]))
    assert not {"spot", "SPOT"} & set(text_of(head["node_config"]))
    assert 0 < launcher["idle_timeout_minutes"] <= 10


def test_nodes_have_the_keys_of_the_clouds_own_api() -> None:
    """Ray's validator does not look into `node_config`."""
    ec2 = {"InstanceType", "ImageId", "BlockDeviceMappings", "InstanceMarketOptions", "MetadataOptions"}
    compute = {"machineType", "disks", "metadata", "scheduling"}
    for name, keys in (("aws.yaml", ec2), ("gcp.yaml", compute)):
        for node in load(name)["available_node_types"].values():
            assert set(node["node_config"]) <= keys
    spot = load("gcp.yaml")["available_node_types"]["gpu_spot"]["node_config"]["scheduling"]
    assert spot[0]["onHostMaintenance"] == "TERMINATE"  # machines with GPUs cannot move


def test_ray_starts_with_a_token_and_a_private_dashboard(launcher: dict[str, Any]) -> None:
    for start in (launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in start[-1]
        assert "ulimit -c 0" in start[-1]  # a core file of a worker shows private images
        arguments = shlex.split(start[-1].partition("ray start")[2])
        ray_cli.commands["start"].make_context("start", arguments, resilient_parsing=True)  # refuses unknown options
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    assert "RAY_enable_autoscaler_v2=1" in launcher["head_start_ray_commands"][-1]
    assert not any("0.0.0.0" in text for text in text_of(launcher))
    assert "/home/ubuntu/.ray/auth_token" in launcher["file_mounts"]  # where Ray looks for it
    assert ["ray", "get-auth-token", "--generate"] in commands()


def test_set_up_is_explicit(launcher: dict[str, Any]) -> None:
    """The defaults of `ray up` install a nightly build."""
    setup = " ".join([*launcher["head_setup_commands"], *launcher["worker_setup_commands"]])
    assert "ray-wheels" not in setup
    assert "anaconda" not in setup
    installed = re.findall(r"ray\[([a-z,]+)\]==([\d.]+)", setup)
    assert set(installed) == {("default,train,tune", ray_version())}
    home = f"/home/{launcher['auth']['ssh_user']}"
    assert launcher["file_mounts"][f"{home}/raytrust"] == "."
    assert "pip install -q -e ~/raytrust" in setup


def test_both_clouds_differ_only_where_they_must() -> None:
    aws, gcp = load("aws.yaml"), load("gcp.yaml")
    for key in set(aws) - {"provider", "available_node_types", "setup_commands", "head_setup_commands"}:
        assert aws[key] == gcp[key], key
    assert len(aws["head_setup_commands"]) == len(gcp["head_setup_commands"])


def test_storage_is_shared_by_the_nodes(launcher: dict[str, Any]) -> None:
    head, worker = (" ".join(launcher[f"{kind}_setup_commands"]) for kind in ("head", "worker"))
    exported = re.findall(r'echo "(/\S+) ', head)
    assert exported == ["/srv/raytrust"]
    assert f"$RAY_HEAD_IP:{exported[0]} {STORAGE}" in worker
    assert f"{exported[0]} {STORAGE}" in head
    assert f"install -d -m 0700 -o ubuntu -g ubuntu {exported[0]}" in head
    assert f"nfs://HEAD{exported[0]}" in TEXTS["README.md"]


def test_programs_that_the_page_asks_of_the_nodes_are_installed(launcher: dict[str, Any]) -> None:
    setup = " ".join([*launcher["head_setup_commands"], *launcher["worker_setup_commands"]])
    packages = set(" ".join(re.findall(r"apt-get install -y -qq ([\w. -]+)", setup)).split())
    for program, package in (("docker", "docker.io"), ("compose", "docker-compose-v2"), ("tmux", "tmux")):
        assert program in TEXTS["README.md"]
        assert package in packages
    assert {"nfs-common", "nfs-kernel-server"} <= packages


# KubeRay


def mapping(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


TEXT, COUNT, ANY = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "object"}
CONTAINER = mapping(
    {
        "name": TEXT,
        "image": TEXT,
        "resources": mapping({"requests": ANY, "limits": ANY}),
        "volumeMounts": {"type": "array", "items": mapping({"name": TEXT, "mountPath": TEXT})},
    },
    {
        "workingDir": TEXT,
        "env": {"type": "array", "items": mapping({"name": TEXT, "value": TEXT})},
        "ports": {"type": "array", "items": mapping({"name": TEXT, "containerPort": COUNT})},
    },
)
CLAIM = mapping({"name": TEXT, "persistentVolumeClaim": mapping({"claimName": TEXT})})
POD = mapping(
    {
        "restartPolicy": {"const": "Never"},  # autoscaler v2 replaces pods itself
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
        "volumes": {"type": "array", "items": CLAIM, "minItems": 1},
        "securityContext": mapping({"fsGroup": COUNT}),
    },
    {"nodeSelector": ANY, "tolerations": {"type": "array"}},
)
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}  # KubeRay takes strings alone
GROUP = {"rayStartParams": PARAMETERS, "template": mapping({"spec": POD})}
COUNTS = {"groupName": TEXT, "replicas": COUNT, "minReplicas": {"const": 0}, "maxReplicas": COUNT}
CLUSTER = mapping(
    {
        "rayVersion": TEXT,
        "authOptions": mapping({"mode": {"const": "token"}}),
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": mapping(
            {"version": {"const": "v2"}, "idleTimeoutSeconds": COUNT, "upscalingMode": {"enum": ["Default"]}}
        ),
        "headGroupSpec": mapping(GROUP),
        "workerGroupSpecs": {"type": "array", "minItems": 1, "items": mapping(GROUP | COUNTS)},
    }
)
JOB = mapping(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": mapping({"name": TEXT}),
        "spec": mapping(
            {
                "entrypoint": TEXT,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
                "backoffLimit": COUNT,
                "shutdownAfterJobFinishes": {"const": True},
                "ttlSecondsAfterFinished": COUNT,
                "rayClusterSpec": CLUSTER,
            }
        ),
    }
)


@pytest.fixture
def job() -> dict[str, Any]:
    _, job = yaml.safe_load_all(TEXTS["kuberay-rayjob.yaml"])
    jsonschema.validate(job, JOB)
    return job


def test_the_schema_refuses_mistakes(job: dict[str, Any]) -> None:
    def worker(job: dict[str, Any]) -> dict[str, Any]:
        return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]

    for mistake in (
        lambda j: j["spec"].update(enableInTreeAutoscaling=True),  # in the wrong place
        lambda j: j["spec"]["rayClusterSpec"].pop("authOptions"),
        lambda j: worker(j).update(minReplicas=1),
        lambda j: worker(j)["rayStartParams"].update({"num-cpus": 4}),
        lambda j: worker(j)["template"]["spec"].update(restartPolicy="Always"),
    ):
        wrong = copy.deepcopy(job)
        mistake(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, JOB)


def test_the_job(job: dict[str, Any]) -> None:
    claim, _ = yaml.safe_load_all(TEXTS["kuberay-rayjob.yaml"])
    cluster = job["spec"]["rayClusterSpec"]
    head, (worker,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert cluster["rayVersion"] == ray_version()
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    resources = yaml.safe_load(yaml.safe_load(worker["rayStartParams"]["resources"]))
    assert resources == {SLOT: 1}
    (container,) = worker["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == worker["rayStartParams"]["num-gpus"]
    assert container["resources"]["limits"]["cpu"] == worker["rayStartParams"]["num-cpus"]
    assert any("spot" in text for text in text_of(worker["template"]["spec"]["nodeSelector"]))
    for group in (head, worker):
        spec = group["template"]["spec"]
        (container,), (volume,) = spec["containers"], spec["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": STORAGE}]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


# What one file names and another defines


def ray_version() -> str:
    (version,) = set(re.findall(r"rayproject/ray:([\d.]+)-py", TEXTS["Dockerfile"]))
    return version


def stages() -> dict[str, str]:
    """Dockerfile targets with their text."""
    parts = re.split(r"^FROM (\S+) AS (\w+)$", TEXTS["Dockerfile"], flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


def test_ray_is_one_version_that_the_package_accepts() -> None:
    for name, text in TEXTS.items():
        named = re.findall(r"ray(?:\[[a-z,]+\]==|Version: \"|project/ray:)([\d.]+)", text)
        assert set(named) <= {ray_version()}, name
    (least,) = re.findall(r'"ray\[[a-z,]+\]>=([\d.]+),<3', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, ray_version().split("."))) >= tuple(map(int, least.split(".")))
    assert tuple(map(int, ray_version().split("."))) >= (2, 52)  # the first with tokens


def test_every_path_in_the_repository_exists() -> None:
    for name, text in TEXTS.items():
        for path in re.findall(r"(?<![\w/.])(?:deploy|docs|sweeps)/[\w./-]*\w", text):
            if path != "deploy/.env":  # made by deploy/secrets.sh
                assert (ROOT / path).exists(), f"{name} names {path}"
    for stage in stages().values():
        for source in re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", stage, re.MULTILINE):
            assert all((ROOT / path).exists() for path in source.split()), source
    for name in re.findall(r"`([\w-]+\.(?:yaml|sh|py))`", TEXTS["README.md"]):
        assert name in TEXTS


def test_images_and_targets() -> None:
    mlflow = load("compose.yaml")["services"]["mlflow"]["build"]
    assert (DEPLOY / mlflow["context"]).resolve() == ROOT
    assert (ROOT / mlflow["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    built = [c for c in commands() if c[:2] == ["docker", "build"]]
    targets = {mlflow["target"], *(c[c.index("--target") + 1] for c in built)}
    assert targets == set(stages())
    images = set(re.findall(r"image: (\S+raytrust\S+)", TEXTS["kuberay-rayjob.yaml"]))
    assert images == {c[c.index("-t") + 1] for c in built} == {c[2] for c in commands() if c[:2] == ["docker", "push"]}
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert images.pop().endswith(f":{version}")
    for service in load("compose.yaml")["services"].values():
        assert not service.get("image", "x:pinned").endswith(":latest")
        assert ":" in service.get("image", "x:pinned")


def test_the_tracking_server_s_parts_find_each_other() -> None:
    compose = load("compose.yaml")
    services = compose["services"]
    postgres, minio, mlflow = (services[n]["environment"] for n in ("postgres", "minio", "mlflow"))
    user, host, port, database = re.fullmatch(
        r"postgresql\+psycopg2://(\w+):\$\{[^}]+\}@(\w+):(\d+)/(\w+)", mlflow["MLFLOW_BACKEND_STORE_URI"]
    ).groups()  # type: ignore[union-attr]
    assert (user, database) == (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"])
    assert (host, port) == ("postgres", "5432")
    assert mlflow["MLFLOW_BACKEND_STORE_URI"].count(postgres["POSTGRES_PASSWORD"]) == 1
    assert mlflow["MLFLOW_S3_ENDPOINT_URL"] == "http://minio" + services["minio"]["command"][-1]
    assert mlflow["AWS_ACCESS_KEY_ID"] == minio["MINIO_ROOT_USER"]
    assert mlflow["AWS_SECRET_ACCESS_KEY"] == minio["MINIO_ROOT_PASSWORD"]
    assert set(services["mlflow"]["depends_on"]) == set(services) - {"mlflow"}
    used = {volume.partition(":")[0] for s in services.values() for volume in s.get("volumes", [])}
    assert used == set(compose["volumes"])


def test_only_the_loopback_interface_is_published() -> None:
    ports = [p for s in load("compose.yaml")["services"].values() for p in s.get("ports", [])]
    (published,) = ports
    address, outside, inside = published.split(":")
    assert address == "127.0.0.1"
    assert f"EXPOSE {inside}\n" in stages()["tracking"]
    assert f"--port {inside}" in stages()["tracking"]
    assert ["ray", "attach", "--port-forward", outside, "deploy/aws.yaml"] in commands()
    named = re.findall(r"http://(?:127\.0\.0\.1|localhost|mlflow\.\S+?):(\d+)", "".join(TEXTS.values()))
    assert set(named) == {outside}


def test_every_variable_is_made_or_has_a_default(tmp_path: Path) -> None:
    (tmp_path / "secrets.sh").write_text(TEXTS["secrets.sh"])
    for _ in range(2):
        subprocess.run(["sh", str(tmp_path / "secrets.sh")], check=True)
        first = (tmp_path / ".env").read_text()
    assert (tmp_path / ".env").read_text() == first  # made once
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    values = dict(line.split("=") for line in first.splitlines())
    assert all(len(value) == 48 for name, value in values.items() if name.endswith("PASSWORD"))
    wanted = set(re.findall(r"\$\{(\w+):\?", TEXTS["compose.yaml"]))
    assert wanted == set(values)
    assert set(re.findall(r"\$\{(\w+)", TEXTS["compose.yaml"])) - wanted == {"MLFLOW_SERVER_ALLOWED_HOSTS"}
    given = set(load("compose.yaml")["services"]["mlflow"]["environment"])
    read = set(re.findall(r"\$(\w+)", stages()["tracking"])) | set(
        re.findall(r'environ\["(\w+)"\]', TEXTS["make_bucket.py"])
    )
    assert read <= given


def test_passwords_stay_where_they_are_made(launcher: dict[str, Any]) -> None:
    """Out of the repository, and out of what `ray up` copies to the nodes; no image holds them."""
    assert "/deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "deploy/.env" in launcher["rsync_exclude"]
    for stage in stages().values():
        sources = " ".join(re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", stage, re.MULTILINE)).split()
        assert not {"deploy", "deploy/", ".", "deploy/.env"} & set(sources)


# What is run


def test_the_commands_of_the_page_exist() -> None:
    """Five of them lead from nothing to a sweep."""
    block = re.search(r"From nothing.*?^```\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    assert block is not None
    assert len(block[1].splitlines()) == 5
    called = [c for c in commands() if c[0] == "ray"]
    assert {c[1] for c in called} == {"get-auth-token", "up", "exec", "attach", "rsync-down", "down"}
    for command in called:
        ray_cli.commands[command[1]].make_context(command[1], command[2:], resilient_parsing=False)
    with pytest.raises(click.UsageError):
        ray_cli.commands["up"].make_context("up", ["--colour", "deploy/aws.yaml"])


def test_the_server_s_options_exist() -> None:
    line = stages()["tracking"].partition("mlflow server")[2].replace("\\\n", " ")
    mlflow_cli.commands["server"].make_context("server", shlex.split(line, comments=True))


@pytest.mark.parametrize("where", ["README.md", "kuberay-rayjob.yaml"])
def test_the_sweep_is_begun_and_resumed(where: str, tmp_path: Path) -> None:
    """With the program's place taken by one that says what it was given."""
    text = TEXTS[where] if where == "README.md" else " ".join(text_of(list(yaml.safe_load_all(TEXTS[where]))))
    line = re.search(r"deploy/sweep\.sh (/mnt[^'\n]*?--preset \w+ --data \w+)", text)
    assert line is not None
    given = line[1].split()
    assert given[0].startswith(STORAGE + "/")
    given[0] = str(tmp_path / "sweep")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o700)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    parser = load_script()._parser()
    for resumed in (False, True):
        if resumed:
            (tmp_path / "sweep").mkdir()
            (tmp_path / "sweep" / "sweep.json").write_text("{}")
        done = subprocess.run(
            ["sh", str(DEPLOY / "sweep.sh"), *given], env=path, capture_output=True, text=True, check=True
        )
        program, *arguments = done.stdout.split()
        assert Path(program).samefile(ROOT / "sweeps" / "privacy_frontier.py")
        options = vars(parser.parse_args(arguments))
        assert options["address"] == "auto"
        assert options["tracking_uri"] == given[1]
        assert options["parallel"] == int(given[2]) == load("aws.yaml")["max_workers"]  # a trial a node
        assert ("resume" in options, "output" in options, "preset" in options) == (resumed, not resumed, not resumed)


def test_the_bucket_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Storage:
        def list_buckets(self) -> dict[str, Any]:
            return {"Buckets": [{"Name": name} for name in made]}

        def create_bucket(self, Bucket: str) -> None:
            made.append(Bucket)

    environment = load("compose.yaml")["services"]["mlflow"]["environment"]
    for name in ("MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, environment[name])
    boto3 = types.SimpleNamespace(client=lambda kind, endpoint_url: Storage())
    monkeypatch.setitem(sys.modules, "boto3", boto3)  # type: ignore[arg-type]
    for _ in range(2):
        exec(compile(TEXTS["make_bucket.py"], "make_bucket.py", "exec"), {})
    assert made == ["mlflow"]
