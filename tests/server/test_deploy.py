"""deploy/ agrees with the program: metrics, flags, routes, ports and times."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quire import LLM, SamplingParams
from quire.cli.arguments import Parser, engine_values
from quire.cli.main import make_parser
from quire.cli.serve import add, run
from quire.cli.settings import completed
from quire.server.http.metrics import render_metrics
from quire.server.http.probes import OPEN_PATHS

DEPLOY = Path(__file__).parents[2] / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def of_kinds(*kinds: str) -> list[dict[str, Any]]:
    found = {item["kind"]: item for item in documents("kubernetes.yaml")}
    return [found[kind] for kind in kinds]


@pytest.fixture(scope="module")
def families() -> dict[str, set[str]]:
    """Sample name -> labels, as /metrics shows them."""
    with LLM() as llm:
        llm.generate("hello", SamplingParams(max_tokens=2), use_tqdm=False)
        found: dict[str, set[str]] = {}
        body = render_metrics(llm.get_metrics(), "m", "quire").decode()
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


def test_the_board_asks_for_what_there_is(families: dict[str, set[str]]) -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) >= 12
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"quire:\w+", target["expr"])
            assert names, panel["title"]
            for name in names:
                assert name in families, f"{panel['title']}: no metric {name}"
                for labels in re.findall(r"by \(([^)]*)\)", target["expr"]):
                    assert set(labels.split(", ")) <= families[name] | {"le"}
                assert "model_name" in families[name]


def flags_exist(words: list[str], environment: dict[str, str] | None = None) -> Any:
    """The options that `quire serve` gets of these words and variables; none of them is unknown."""
    said: list[str] = []
    parser = Parser(prog="quire serve", allow_abbrev=False)
    add(parser)
    found = completed(words, parser, environment or {}, said.append)
    options = make_parser(["serve"]).parse_args(["serve", *found])
    assert options.verb == "serve" and callable(run) and said == []
    return options


def test_flags_of_the_image_and_of_its_users() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    entry, command = (json.loads(re.search(rf"^{word} (.*)$", text, re.M)[1]) for word in ("ENTRYPOINT", "CMD"))  # type: ignore[index]
    assert entry[:2] == ["quire", "serve"]
    flags_exist([*entry[2:], *command])
    port = entry[entry.index("--port") + 1]
    assert f"EXPOSE {port}" in text
    probed = re.search(rf"http://127\.0\.0\.1:{port}(/\w+)", text)
    assert probed is not None and probed[1] in OPEN_PATHS
    (compose,) = documents("compose.yaml")
    flags_exist([*entry[2:], *compose["services"]["quire"]["command"]])
    deployment, service = of_kinds("Deployment", "Service")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    flags_exist([*entry[2:], *container["args"]], {item["name"]: item["value"] for item in container["env"]})
    assert [str(item["containerPort"]) for item in container["ports"]] == [port]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_probes_need_no_key_and_time_to_stop_is_enough() -> None:
    deployment, _ = of_kinds("Deployment", "Service")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert set(paths.values()) <= OPEN_PATHS
    drain_s = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    assert pod["terminationGracePeriodSeconds"] > drain_s
    (compose,) = documents("compose.yaml")
    assert int(compose["services"]["quire"]["stop_grace_period"].removesuffix("s")) > drain_s


def test_prometheus_scrapes_the_service() -> None:
    (scrape,) = documents("prometheus.yaml")
    job = scrape["scrape_configs"][0]
    (compose,) = documents("compose.yaml")
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"][0].split(":") == ["quire", "8000"] and "quire" in compose["services"]


def test_the_image_is_made_from_sources_alone() -> None:
    """Keys beside the compose file stay out of it, and so does a native module built for another Python."""
    ignored = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert {".git", "build", "deploy", "**/*.so"} <= set(ignored)
    (compose,) = documents("compose.yaml")
    assert compose["secrets"]["keys"]["file"] == "./keys"
    for needed in ("src", "native", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        assert (DEPLOY.parent / needed).exists() and needed not in ignored


def mounts(items: list[str]) -> dict[str, tuple[str, bool]]:
    """Place -> source and whether it is read-only, of a compose file's volumes."""
    parts = [item.split(":") for item in items]
    return {part[1]: (part[0], part[2:] == ["ro"]) for part in parts}


def test_models_are_mounted_and_what_the_hub_gives_is_kept() -> None:
    """A model of your own is read-only; the hub's cache is a volume that the image's user may write to."""
    image = (DEPLOY / "Dockerfile").read_text()
    cache = re.search(r"^ENV HF_HOME=(\S+)$", image, re.M)
    assert cache is not None and f"VOLUME {cache[1]}\n" in image
    assert re.search(rf"install --directory --owner 1000 {cache[1]}$", image, re.M) and "USER 1000" in image
    (compose,) = documents("compose.yaml")
    service = compose["services"]["quire"]
    found = mounts(service["volumes"])
    assert found["/models"] == ("./models", True)
    assert found[cache[1]][0] in compose["volumes"] and not found[cache[1]][1]
    options = flags_exist(service["command"], {"QUIRE_MODEL": "/models/mine"})
    assert service["environment"] == {"QUIRE_MODEL": "${QUIRE_MODEL:-quire-demo}"}
    assert engine_values(options) == {"model": "/models/mine"}
    pod = of_kinds("Deployment")[0]["spec"]["template"]["spec"]
    placed = {item["mountPath"]: item for item in pod["containers"][0]["volumeMounts"]}
    claims = {item["metadata"]["name"] for item in documents("kubernetes.yaml") if item["kind"].endswith("Claim")}
    volumes = {item["name"]: item for item in pod["volumes"]}
    assert placed["/models"]["readOnly"] and not placed[cache[1]].get("readOnly")
    for place in ("/models", cache[1]):
        assert volumes[placed[place]["name"]]["persistentVolumeClaim"]["claimName"] in claims
    assert pod["enableServiceLinks"] is False, "a service named quire would set QUIRE_PORT=tcp://..."
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]


def test_the_unit_runs_what_there_is_and_stops_it_gently() -> None:
    unit = (DEPLOY / "quire.service").read_text()
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit, re.M))
    program, verb, *words = settings["ExecStart"].split()
    assert (program.rpartition("/")[2], verb) == ("quire", "serve")
    place = words.index("--config") + 1
    assert words[place] == "/etc/quire/quire.yaml"
    words[place] = str(DEPLOY / "quire.yaml")
    options = flags_exist(words)
    assert engine_values(options)["max_model_len"] == 8192 and options.api_key_file.endswith("/keys")
    assert settings["LoadCredential"].split(":")[0] == "keys"
    assert int(settings["TimeoutStopSec"]) > options.shutdown_timeout and settings["KillMode"] == "mixed"
    assert settings["Environment"] == f"HF_HOME=/var/cache/{settings['CacheDirectory']}"
    assert settings["ProtectSystem"] == "strict" and settings["DynamicUser"] == settings["NoNewPrivileges"] == "yes"
