"""deploy/ agrees with the program: metrics, flags, routes, ports and times."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quire import LLM, SamplingParams
from quire.cli.main import make_parser
from quire.cli.serve import run
from quire.server.http.metrics import render_metrics
from quire.server.http.probes import OPEN_PATHS

DEPLOY = Path(__file__).parents[2] / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


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


def flags_exist(words: list[str]) -> None:
    options = make_parser(["serve"]).parse_args(["serve", *words])
    assert options.verb == "serve" and callable(run)


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
    deployment, service = documents("kubernetes.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    flags_exist([*entry[2:], *container["args"]])
    assert [str(item["containerPort"]) for item in container["ports"]] == [port]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_probes_need_no_key_and_time_to_stop_is_enough() -> None:
    deployment, _ = documents("kubernetes.yaml")
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
