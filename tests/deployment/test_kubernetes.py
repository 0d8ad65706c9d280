"""server/kubernetes.yaml and client/kubernetes.yaml: of the schema, shut in, and with commands that fedvfm has.

No cluster is needed. PyYAML resolves anchors, as kubectl does.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from fedvfm.cli import main
from fedvfm.config import schema

ROOT = Path(__file__).parents[2]
FILES = {name: ROOT / name / "kubernetes.yaml" for name in ("server", "client")}
VERSIONS = ("1.28.0", "1.37.0")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(FILES[name].read_text()))


def of_kind(name: str, kind: str) -> list[dict[str, Any]]:
    return [each for each in documents(name) if each["kind"] == kind]


def pod(name: str) -> dict[str, Any]:
    (deployment,) = of_kind(name, "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def containers(name: str) -> list[dict[str, Any]]:
    return [*pod(name)["initContainers"], *pod(name)["containers"]]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_of_the_schema_of_kubernetes(name: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[dev]' brings kubernetes-validate")
    for each in documents(name):
        validate.validate(each, version, strict=True)
    (deployment,) = of_kind(name, "Deployment")
    wrong = copy.deepcopy(deployment)
    wrong["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRoot"] = True
    with pytest.raises(validate.ValidationError, match="readOnlyRoot"):
        validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_pods_are_shut_in(name: str) -> None:
    """Profile "restricted" of the Pod Security Standards, a root that cannot be written, no token of the cluster."""
    own = pod(name)
    (namespace,) = of_kind(name, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert own["automountServiceAccountToken"] is False
    assert own["securityContext"] == {
        **{"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001},
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(own)
    for each in containers(name):
        assert each["securityContext"] == {
            **{"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True},
            "capabilities": {"drop": ["ALL"]},
        }, each["name"]
        assert not {"env", "envFrom"} & set(each), "no secret is in an environment variable"
        assert {"requests", "limits"} == set(each["resources"])
    volumes = {volume["name"]: volume for volume in own["volumes"]}
    assert not [volume for volume in volumes.values() if "hostPath" in volume or "secret" in volume]
    assert {"images", "site"} <= {
        mount["name"] for mount in containers("client")[-1]["volumeMounts"] if mount.get("readOnly")
    }


@pytest.mark.parametrize("name", FILES)
def test_the_network_is_shut_but_for_what_each_end_needs(name: str) -> None:
    everything, own = of_kind(name, "NetworkPolicy")
    assert everything["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    spec = own["spec"]
    if name == "server":
        assert spec["policyTypes"] == ["Ingress"]
        assert spec["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8443}]}]
        return
    assert spec["policyTypes"] == ["Egress"]
    coordinator, names = spec["egress"]
    assert coordinator["to"] == [{"ipBlock": {"cidr": "203.0.113.10/32"}}]
    assert {port["port"] for port in coordinator["ports"]} == {8443}
    assert {port["port"] for port in names["ports"]} == {53}


def test_the_proxy_sees_its_certificate_and_nothing_else_of_the_server() -> None:
    (proxy,) = [each for each in containers("server") if each["name"] == "proxy"]
    assert {mount["name"] for mount in proxy["volumeMounts"]} == {"edge", "proxy-tmp"}
    (server,) = [each for each in containers("server") if each["name"] == "server"]
    assert server["args"][server["args"].index("--listen") + 1].startswith("127.0.0.1:"), "reached by the proxy alone"


def test_images_are_those_of_compose_and_of_the_dockerfiles() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    built = {compose[key]["image"] for key in ("x-server", "x-site")} | {compose["services"]["proxy"]["image"]}
    assert {each["image"] for each in containers("server")} <= built
    assert {each["image"] for each in containers("client")} == {"fedvfm-site:0.1.0"}
    assert "-t fedvfm-site ." in (ROOT / "client" / "Dockerfile").read_text()


def arguments() -> list[tuple[str, list[str]]]:
    rows = []
    for name in FILES:
        for each in containers(name):
            rows += [(name, words) for words in (each.get("args"),) if words and each["name"] != "proxy"]
            probe = each.get("livenessProbe", {}).get("exec", {}).get("command")
            rows += [(name, probe[1:])] if probe else []
    return rows


@pytest.mark.parametrize(("name", "words"), arguments())
def test_commands_are_ones_that_fedvfm_has(name: str, words: list[str]) -> None:
    command: Any = typer.main.get_command(main.app)
    context, rest = click.Context(command), list(words)
    while isinstance(command, click.Group):
        command = command.get_command(context, rest.pop(0))
        assert command is not None, words
    command.make_context(name, rest)


def test_the_site_of_the_example_accepts_nothing() -> None:
    import tomllib

    (config,) = of_kind("client", "ConfigMap")
    site = schema.parse(schema.SiteConfig, tomllib.loads(config["data"]["site.toml"]), "site.toml")
    assert site.policy == schema.PolicyConfig()
    mounts = {mount["mountPath"] for mount in containers("client")[-1]["volumeMounts"]}
    assert site.data.path in mounts
