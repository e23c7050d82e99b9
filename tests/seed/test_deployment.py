"""Deployment: the units, the image, the compose file and the manifests that ``flowkit install`` makes, each held against what
reads it (systemd, hadolint, the compose specification, the schemas of Kubernetes and KEDA), and then run for real.

FLOWKIT_REQUIRE_SYSTEMD   1: fail where systemd-analyze or unshare is missing, instead of skipping
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import command, flowkit, read_topic
from processes import BIN, Process
from servers import ApacheKafka, Kafka, MakeTopic, WaitFor, why_not_apache_kafka

from flowkit.devstack import HOST, Server, free_port
from flowkit.install import install
from flowkit.locate import locate
from flowkit.processes import PRESS_EVERY, PRESS_FOR
from flowkit.settings import Settings

SCHEMAS = Path(__file__).parents[1] / "schemas"
LONGEST_STOP = Settings().shutdown_timeout + PRESS_FOR + PRESS_EVERY


def needed(tool: str, package: str) -> str:
    found = shutil.which(tool)
    if found is None:
        if os.environ.get("FLOWKIT_REQUIRE_SYSTEMD") == "1":
            pytest.fail(f"FLOWKIT_REQUIRE_SYSTEMD is set, but {tool} is missing: install the package {package}")
        pytest.skip(f"{tool} is missing: install the package {package}")
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed") / "shop"
    list(install(folder, "shop"))
    return folder


@pytest.fixture(scope="module")
def handling(project: Path) -> Iterator[Any]:
    """The one route of the project."""
    path = list(sys.path)
    yield locate("app:app", project).handling("hello")
    sys.path[:] = path
    del sys.modules["app"]


# systemd.


UNITS = ["run", "worker"]


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, project: Path) -> Path:
    return project / "deploy" / "systemd" / f"shop-{request.param}.service"


def options(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser["Service"]


def test_systemd_finds_no_mistake_in_the_units(unit: Path, tmp_path: Path) -> None:
    tool = needed("systemd-analyze", "systemd")
    program = tmp_path / ".venv" / "bin" / "flowkit"
    program.parent.mkdir(parents=True)
    program.symlink_to(BIN / "flowkit")
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace("/opt/shop", str(tmp_path)))
    done = command(tool, "verify", "--man=no", str(here))
    assert done == (0, "", "")

    here.write_text(here.read_text().replace("KillMode=mixed", "KillMode=maybe"))
    assert "kill mode" in command(tool, "verify", "--man=no", str(here)).err  # it would tell


def test_systemd_calls_the_units_well_guarded(unit: Path) -> None:
    tool = needed("systemd-analyze", "systemd")
    done = command(tool, "security", "--offline=true", "--no-pager", "--threshold=20", str(unit))

    assert done.code == 0, done.out[-300:]


def test_the_units_wait_for_readiness_and_leave_time_to_stop(unit: Path) -> None:
    service = options(unit)

    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"
    assert int(service["WatchdogSec"]) > 0
    assert int(service["TimeoutStopSec"]) > LONGEST_STOP
    assert service["RestartPreventExitStatus"] == "2"


def test_the_command_of_each_unit_is_one_that_flowkit_has(unit: Path, project: Path) -> None:
    program, *arguments = shlex.split(options(unit)["ExecStart"])

    assert program == "/opt/shop/.venv/bin/flowkit"
    assert flowkit(*arguments, "--help", cwd=project).code == 0


# In the background.


def test_a_server_goes_on_in_the_background_and_is_stopped_by_its_pid_file(
    kafka: Kafka, topic: MakeTopic, tmp_path: Path
) -> None:
    pid_file, log = tmp_path / "pid", tmp_path / "background.log"
    env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "STEADY_IN": topic("background")}
    done = flowkit("run", "steady:app", "--daemon", "--pid", str(pid_file), "--log", str(log), env=env)
    assert done.code == 0, done.err
    pid = int(pid_file.read_text())
    try:
        assert Path(f"/proc/{pid}").exists()
        assert flowkit("run", "steady:app", "--daemon", "--pid", str(pid_file), env=env).code == 1
        done = flowkit("stop", "--pid", str(pid_file))
        assert done == (0, f"process {pid} has ended: every message in hand was finished\n", "")
        assert not pid_file.exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# The image.


def dockerfile(project: Path) -> list[tuple[str, str]]:
    """Its instructions, in order."""
    text = (project / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def test_hadolint_finds_no_mistake_in_the_dockerfile(project: Path, tmp_path: Path) -> None:
    done = command(str(BIN / "hadolint"), "--no-color", str(project / "Dockerfile"))
    assert done == (0, "", "")

    (tmp_path / "Dockerfile").write_text("FROM python\nCMD flowkit run\n")
    assert command(str(BIN / "hadolint"), "--no-color", str(tmp_path / "Dockerfile")).code == 1  # it would tell


def test_the_image_runs_as_nobody_special_and_passes_signals(project: Path) -> None:
    steps = dockerfile(project)
    names = [name for name, _ in steps]
    last = dict(steps)

    assert last["USER"] == "10001:10001"
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert json.loads(last["ENTRYPOINT"]) == ["flowkit"]  # exec form: no shell in between
    assert json.loads(last["CMD"]) == ["run"]
    assert json.loads(last["HEALTHCHECK"].split(" CMD ", 1)[1])[0] == "python"


def test_the_layer_of_the_requirements_outlasts_an_edit_of_the_application(project: Path) -> None:
    steps = dockerfile(project)
    copies = [index for index, step in enumerate(steps) if step[0] == "COPY"]
    install_step = next(index for index, (name, text) in enumerate(steps) if name == "RUN" and "pip install" in text)

    assert [steps[index][1] for index in copies] == ["requirements.txt ./", ". ./"]
    assert copies[0] < install_step < copies[1]


def test_no_settings_and_no_history_get_into_the_image(project: Path) -> None:
    ignored = (project / ".dockerignore").read_text().splitlines()

    assert ".*" in ignored  # .env, .git, .venv
    assert {"deploy", "log", "tests", "tmp"} <= set(ignored)
    assert not any(line.startswith("!") for line in ignored)


# The compose file.


def compose(project: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((project / "compose.yaml").read_text())
    return loaded


def test_the_compose_file_is_what_the_specification_says(project: Path, tmp_path: Path) -> None:
    check = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = command(str(BIN / check[0]), *check[1:], str(project / "compose.yaml"))
    assert done.code == 0, done.out

    wrong = tmp_path / "compose.yaml"
    wrong.write_text((project / "compose.yaml").read_text().replace("stop_grace_period", "stop_grace"))
    assert command(str(BIN / check[0]), *check[1:], str(wrong)).code == 1  # it would tell


def test_compose_leaves_time_to_stop_and_waits_for_health(project: Path) -> None:
    services = compose(project)["services"]

    for name in ("run", "worker"):
        assert int(services[name]["stop_grace_period"][:-1]) > LONGEST_STOP
        assert services[name]["depends_on"] == {
            "kafka": {"condition": "service_healthy"},
            "redis": {"condition": "service_healthy"},
            "topics": {"condition": "service_completed_successfully"},
        }
    assert all("healthcheck" in service for service in services.values())


class ComposedRedis(Server):
    """The Redis of the compose file, by its own command."""

    name = "the Redis of the compose file"
    question = b"PING\r\n"
    answer = b"+PONG"
    advice = "See its command."

    def __init__(self, composed: list[str], directory: Path) -> None:
        super().__init__()
        self.composed = composed
        self.directory = directory

    def command(self) -> list[str]:
        return [*self.composed, "--port", str(self.port), "--bind", HOST, "--dir", str(self.directory)]


def properties(environment: dict[str, Any], inside: int) -> str:
    """What the image of Apache Kafka makes of its environment; here everything is on this machine."""
    lines = []
    for name, value in environment.items():
        assert re.fullmatch(r"KAFKA(_[A-Z]+)+", name), name
        lines.append(f"{name.removeprefix('KAFKA_').lower().replace('_', '.')}={value}")
    text = "\n".join(lines)
    text = text.replace("//:", "//kafka:").replace("kafka:", f"{HOST}:").replace("/var/lib/kafka", "{directory}")
    for port, here in (("29093", "{controller_port}"), ("19092", str(inside)), ("9092", "{port}")):
        text = re.sub(rf":{port}\b", f":{here}", text)
    return text


def test_what_compose_starts_works_together_each_as_the_first_process_of_its_container(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor
) -> None:
    if reason := why_not_apache_kafka():
        pytest.skip(reason)
    needed("redis-server", "redis-server")
    unshare = [needed("unshare", "util-linux"), "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        unshare.insert(1, "--map-root-user")
    services = compose(project)["services"]
    inside = free_port()
    monkeypatch.setattr("servers.PROPERTIES", properties(services["kafka"]["environment"], inside))
    image = dict(
        re.findall(r"(\w+)=(\S+)", next(text for name, text in dockerfile(project) if "FLOWKIT_APP" in text))
    )
    entry = str(BIN / json.loads(dict(dockerfile(project))["ENTRYPOINT"])[0])
    with (
        ApacheKafka(tmp_path / "kafka") as kafka,
        ComposedRedis(services["redis"]["command"], tmp_path) as redis,
        contextlib.ExitStack() as running,
    ):
        env = {
            **image,
            **services["run"]["environment"],
            "FLOWKIT_KAFKA_HOSTS": f"{HOST}:{inside}",
            "FLOWKIT_REDIS": services["run"]["environment"]["FLOWKIT_REDIS"].replace(
                "redis:6379", f"{HOST}:{redis.port}"
            ),
        }
        done = command(entry, *services["topics"]["command"], cwd=project, env={**env, "FLOWKIT_HEALTH": ""})
        assert done.code == 0, done.out + done.err

        processes = {}
        for name in ("run", "worker"):
            port = str(free_port())
            log, here = tmp_path / f"{name}.log", {**env, "FLOWKIT_HEALTH": port}
            started = Process(*unshare, entry, *services[name]["command"], cwd=project, env=here, log=log)
            processes[name] = running.enter_context(started)
            probe = [part.replace(":8080/", f":{port}/") for part in services[name]["healthcheck"]["test"][1:]]
            wait_for(lambda probe=probe: command(*probe).code == 0, what=f"{name} to be healthy")  # type: ignore[misc]

        send = flowkit(
            "send", "app:app", "hello", '{"name": "Ann"}', cwd=project, env={"FLOWKIT_KAFKA_HOSTS": kafka.hosts}
        )
        assert send.code == 0, send.err  # by the listener for this machine
        (greeting,) = read_topic(kafka.hosts, "greetings", 1)
        assert json.loads(greeting.value)["text"] == "Hello, Ann!"

        for process in processes.values():
            (first,) = process.children()
            status = Path(f"/proc/{first}/status").read_text()
            assert re.search(r"NSpid:\s+\d+\s+1$", status, re.MULTILINE)  # the first one of its namespace
            os.kill(first, signal.SIGTERM)
            assert process.wait() == 0, process.output


# Kubernetes.


def manifests(project: Path) -> list[Any]:
    folder = project / "deploy" / "kubernetes"
    return [part for path in sorted(folder.glob("*.yaml")) for part in yaml.safe_load_all(path.read_text())]


def of_kind(project: Path, *kinds: str) -> list[Any]:
    return [manifest for manifest in manifests(project) if manifest["kind"] in kinds]


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_manifests_fit_the_schemas_of_kubernetes(project: Path, version: str) -> None:
    core = [manifest for manifest in manifests(project) if manifest["kind"] != "ScaledObject"]
    assert len(core) == 5
    for manifest in core:
        kubernetes_validate.validate(manifest, version, strict=True)

    deployment = next(manifest for manifest in core if manifest["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):  # it would tell
        kubernetes_validate.validate(deployment, version, strict=True)


def closed(schema: Any) -> Any:
    """The schema, with what Kubernetes would drop in silence refused."""
    if isinstance(schema, dict):
        schema = {name: closed(part) for name, part in schema.items()}
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        schema = [closed(part) for part in schema]
    return schema


def test_the_scalers_fit_the_schema_of_keda_and_watch_what_the_application_uses(project: Path, handling: Any) -> None:
    keda = json.loads((SCHEMAS / "keda.json").read_text())
    schema = closed(keda["scaledobject"])
    schema["properties"]["metadata"] = {"type": "object"}
    found = {}
    for scaler in of_kind(project, "ScaledObject"):
        jsonschema.validate(scaler, schema)
        for trigger in scaler["spec"]["triggers"]:
            known = {parameter["name"]: parameter for parameter in keda["triggers"][trigger["type"]]}
            for name, value in trigger["metadata"].items():
                assert isinstance(value, str), f"KEDA takes text only: {name}"
                assert value in known[name].get("allowedValue", [value])
            found[trigger["type"]] = (scaler["spec"]["scaleTargetRef"]["name"], trigger["metadata"])
    with pytest.raises(jsonschema.ValidationError):  # it would tell
        jsonschema.validate({"spec": {"scaleTargetRef": {"name": "x"}, "triggers": [], "maxReplicas": 1}}, schema)

    deployments = {manifest["metadata"]["name"] for manifest in of_kind(project, "Deployment")}
    assert deployments == {"shop-run", "shop-worker"} == {target for target, _ in found.values()}
    assert found["kafka"][1]["consumerGroup"] == handling.group
    assert found["kafka"][1]["topic"] == handling.topic
    assert found["redis"][1]["listName"] == f"rq:queue:{handling.queue}"
    assert found["redis"][1]["databaseIndex"] == "0"


def test_pods_have_probes_time_to_stop_and_few_rights(project: Path) -> None:
    for deployment in of_kind(project, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] > LONGEST_STOP
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}
        assert container["ports"] == [{"name": "health", "containerPort": 8080}]  # FLOWKIT_HEALTH of the image
    for workload in of_kind(project, "Deployment", "Job"):
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert f"{pod['securityContext']['runAsUser']}" in dict(dockerfile(project))["USER"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert flowkit(*container["args"], "--help", cwd=project).code == 0


def test_secrets_are_a_template_that_git_does_not_take(project: Path) -> None:
    (secret,) = of_kind(project, "Secret")
    known = {"FLOWKIT_REDIS", "FLOWKIT_KAFKA_HOSTS"}
    (config,) = of_kind(project, "ConfigMap")

    assert {*secret["stringData"], *config["data"]} == known
    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    for path in ("deploy/kubernetes/secret.yaml", ".env"):
        assert subprocess.run(["git", "-C", str(project), "check-ignore", "--quiet", path]).returncode == 0
    shutil.rmtree(project / ".git")
