"""Dashboard and alerts: they ask for what workers and Ray export, and fire when they should."""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from every import for_every
from kustomizing import render
from prometheus_client import REGISTRY
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.util.metrics import Counter, Histogram, Metric

import cifake_ray
from cifake_ray.config import ConvertConfig
from cifake_ray.stages.batch.prometheus import DONE, SHARD_SECONDS, WorkMetrics
from cifake_ray.stages.batch.ray_pool import ShardActor

PROJECT = Path(cifake_ray.__file__).parents[1]
FOLDER = PROJECT / "deploy" / "observability"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]
}
RULE_TESTS = Path(__file__).with_name("alerts.yaml")
README = (PROJECT / "deploy" / "README.md").read_text()
OF_EVERY_METRIC = {"SessionName", "instance"}  # Ray's, and Prometheus' own for a target
OF_GRAFANA = {"__rate_interval", "__range"}

Uses = dict[str, set[str]]  # metric -> labels


def find_uses(expr: str) -> Uses:
    """The metrics of an expression in PromQL, each with the labels that are asked of it."""
    expr = re.sub(r'"[^"]*"', '""', expr)
    expr = re.sub(r"\[[^\]]*\]|\boffset\s+\w+", " ", expr)
    grouping = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)"
    shared = {label for names in re.findall(grouping, expr) for label in re.findall(r"\w+", names)}
    expr = re.sub(grouping, " ", expr)
    uses: Uses = {}
    found = r"\b([a-zA-Z_]\w*)\b(?!\s*\()\s*(?:\{([^}]*)\})?"
    for name, matchers in re.findall(found, expr):
        if name not in ("and", "or", "unless", "bool"):
            labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
            uses.setdefault(name, set()).update(labels, shared)
    return uses


@cache
def list_ours() -> Uses:
    """What Ray's agent makes of the workers' metrics, by the recorder that it exports them with."""
    recorder = OpenTelemetryMetricRecorder()
    ours = [value for value in vars(WorkMetrics("score")).values() if isinstance(value, Metric)]
    for metric in ours:
        name, tags = metric.info["name"], dict.fromkeys(metric.info["tag_keys"], "x")
        if isinstance(metric, Histogram):
            recorder.register_histogram_metric(name, "", metric.boundaries)
        else:
            assert isinstance(metric, Counter)
            recorder.register_counter_metric(name, "")
        recorder.set_metric_value(name, tags, 1)
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    uses: Uses = {}
    for sample in samples:
        if sample.name.startswith("ray_cifake_"):
            uses.setdefault(sample.name, set()).update(sample.labels)
    assert len(uses) == 5, "two counters and a histogram's three"
    return uses


@cache
def list_rays() -> Uses:
    """What the nodes export, and what Ray's own dashboards ask for."""
    uses: Uses = {f"ray_{name}": set(gauge.view.columns) for name, gauge in METRICS_GAUGES.items()}
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    for path in folder.glob("*_panels.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "expr":
                if not isinstance(node.value, ast.Constant):
                    continue
                expr = node.value.value.replace("{global_filters}", "").replace("{{", "{")
                for name, labels in find_uses(expr.replace("}}", "}")).items():
                    uses.setdefault(name, set()).update(labels)
    return uses


def find_faults(expr: str) -> list[str]:
    """Metrics and labels of an expression that nothing exports."""
    known = list_rays() | list_ours()
    faults = []
    for name, labels in find_uses(expr).items():
        if name not in known:
            faults.append(name)
        else:
            faults += [f"{name}:{label}" for label in labels - known[name] - OF_EVERY_METRIC]
    return faults


def find_targets(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield from panel.get("targets", [])


EXPRESSIONS = [target["expr"] for target in find_targets(DASHBOARD)]
EXPRESSIONS += [alert["expr"] for alert in ALERTS.values()]


@for_every(EXPRESSIONS)
def test_every_metric_and_label_exists(expr: str) -> None:
    assert find_uses(expr)
    assert find_faults(expr) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("ray_cifake_images_total", "ray_cifake_images", "ray_cifake_images"),
        ("ray_cifake_images_total", "cifake_images_total", "cifake_images_total"),
        ("outcome!=", "error!=", "ray_cifake_images_total:error"),
        ("(SessionName, verb)", "(SessionName, verbs)", "ray_cifake_images_total:verbs"),
    ],
)
def test_a_metric_or_label_that_is_misspelt_is_found(old: str, new: str, fault: str) -> None:
    expr = ALERTS["CifakeImagesFail"]["expr"]
    assert old in expr
    assert fault in find_faults(expr.replace(old, new))


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("sum(ray_node_memory_used)", "ray_node_memory_used"),
        ('ray_object_store_memory{Place="SPILLED"}', "ray_object_store_memory:Place"),
        ("rate(ray_cifake_shard_seconds[5m])", "ray_cifake_shard_seconds"),
        ("ray_node_cpu_count > 0 unless ray_node_gone offset 5m", "ray_node_gone"),
    ],
)
def test_what_ray_does_not_export_is_found(expr: str, fault: str) -> None:
    assert find_faults(expr) == [fault]


def test_all_that_workers_count_is_on_the_dashboard() -> None:
    shown = {name for target in find_targets(DASHBOARD) for name in find_uses(target["expr"])}
    assert list_ours().keys() - shown == {"ray_cifake_shard_seconds_sum"}, "from bucket midpoints"


def test_outcomes_states_and_names_are_those_of_the_program_and_of_ray() -> None:
    text = "\n".join(EXPRESSIONS)
    assert set(re.findall(r'outcome\W+"(\w+)"', text)) == {DONE}
    [name] = re.findall(r'Name=~"\.\*(\w+)\.\*"', text)
    assert name == ShardActor.__name__, "Ray names actors after their class"
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    assert set(re.findall(r'Location="(\w+)"', text)) == {"SPILLED"}
    assert b"SPILLED" in raylet.read_bytes()


def test_bounds_of_shard_seconds_rise_and_reach_from_seconds_to_an_hour() -> None:
    assert sorted(set(SHARD_SECONDS)) == SHARD_SECONDS
    assert SHARD_SECONDS[0] < 1
    assert SHARD_SECONDS[-1] >= 3000
    steps = pairwise(SHARD_SECONDS)
    assert all(high / low < 3.5 for low, high in steps), "a quantile is as exact as its bucket"


# The dashboard


def find_layout_faults(dashboard: dict[str, Any]) -> set[str]:
    """Rules that Grafana does not check, but shows the breach of."""
    faults = set()
    panels = dashboard["panels"]
    if len({panel["id"] for panel in panels}) < len(panels):
        faults.add("two panels have one id")
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        if cells & taken:
            faults.add("panels overlap")
        if grid["x"] + grid["w"] > 24:
            faults.add("wider than the grid")
        taken |= cells
        targets = panel.get("targets", [])
        if len({target["refId"] for target in targets}) < len(targets):
            faults.add("two targets have one refId")
        if panel["type"] != "row" and not targets:
            faults.add("empty panel")
        if not panel["title"] or (targets and "unit" not in panel["fieldConfig"]["defaults"]):
            faults.add("no title or unit")
    text = json.dumps(dashboard)
    sources = re.findall(r'"uid": "([^"]*)"', text.replace(f'"uid": "{dashboard["uid"]}"', ""))
    if set(sources) != {"${datasource}"}:
        faults.add("a data source of one Grafana")
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    if set(re.findall(r"\$\{?(\w+)", text)) - variables - OF_GRAFANA != {"__all"}:
        faults.add("a variable that is not there")
    return faults


def test_the_dashboard_breaks_no_rule() -> None:
    assert find_layout_faults(DASHBOARD) == set()
    assert len(DASHBOARD["panels"]) > 15


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("panels", 3, "id"), 2, "two panels have one id"),
        (("panels", 3, "gridPos", "x"), 2, "panels overlap"),
        (("panels", 3, "gridPos", "w"), 20, "wider than the grid"),
        (("panels", 3, "targets"), [], "empty panel"),
        (("panels", 3, "title"), "", "no title or unit"),
        (("panels", 3, "datasource", "uid"), "P1809F7CD", "a data source of one Grafana"),
        (("panels", 3, "targets", 0, "expr"), "up{job=$job}", "a variable that is not there"),
    ],
)
def test_a_rule_that_the_dashboard_breaks_is_found(
    place: tuple[Any, ...], value: Any, fault: str
) -> None:
    broken: Any = copy.deepcopy(DASHBOARD)
    *parents, last = place
    inner = broken
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert fault in find_layout_faults(broken)


def test_every_panel_follows_the_chosen_sessions() -> None:
    for target in find_targets(DASHBOARD):
        selectors = re.findall(r"\bray_\w+\{([^}]*)\}", target["expr"])
        assert len(selectors) == len(re.findall(r"\bray_\w+", target["expr"]))
        assert all('SessionName=~"$session"' in selector for selector in selectors)


# The alerts


@for_every(ALERTS)
def test_an_alert_says_what_it_means_and_the_readme_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+m", alert["for"])
    assert alert["labels"]["severity"] in ("warning", "critical")
    assert alert["annotations"].keys() == {"summary", "description"}
    used = re.findall(r"\$labels\.(\w+)", "".join(alert["annotations"].values()))
    grouped = re.search(r"by \(([^)]*)\)", alert["expr"])
    assert grouped is not None
    assert set(used) <= set(grouped[1].split(", "))
    assert f"`{name}`" in README


def test_the_readme_names_no_other_alert() -> None:
    assert set(re.findall(r"`(Cifake\w+)`", README)) == ALERTS.keys()


def test_alerts_agree_with_what_the_program_does_by_itself() -> None:
    [share] = re.findall(r"> (0\.\d+)", ALERTS["CifakeImagesFail"]["expr"])
    assert float(share) == ConvertConfig.max_error_rate
    still = ALERTS["CifakeRunStandsStill"]
    [window] = re.findall(r"\[(\d+)m\]", still["expr"])
    minutes = int(window) + int(still["for"].removesuffix("m"))
    assert minutes * 60 < ConvertConfig.stall_timeout_s, "after that the run has ended, with code 6"
    thresholds = {
        step["value"]
        for panel in DASHBOARD["panels"]
        for step in panel.get("fieldConfig", {})
        .get("defaults", {})
        .get("thresholds", {})
        .get("steps", [])
    }
    assert thresholds == {None, ConvertConfig.max_error_rate}


def run_promtool(*words: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr if done.returncode else ""


def test_prometheus_takes_the_rules() -> None:
    assert run_promtool("check", "rules", str(FOLDER / "prometheus-rules.yaml")) == ""


def test_prometheus_can_parse_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{n}", "expr": re.sub(r"\$__\w+", "5m", target["expr"])}
        for n, target in enumerate(find_targets(DASHBOARD))
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert run_promtool("check", "rules", str(path)) == ""
    path.write_text(path.read_text().replace("sum by", "sum by by"))
    assert "parse error" in run_promtool("check", "rules", str(path))


def test_alerts_fire_when_they_should_and_only_then() -> None:
    tested = yaml.safe_load(RULE_TESTS.read_text())
    cases = [case for test in tested["tests"] for case in test["alert_rule_test"]]
    for wanted in (True, False):
        named = {case["alertname"] for case in cases if bool(case["exp_alerts"]) is wanted}
        assert named == ALERTS.keys(), "every alert has a case in which it fires, and one not"
    assert run_promtool("test", "rules", str(RULE_TESTS)) == ""


# Kubernetes


def test_the_operator_gets_the_same_rules_and_the_ray_pods() -> None:
    kinds = {manifest["kind"]: manifest for manifest in render(FOLDER / "kuberay")}
    assert kinds.keys() == {"PodMonitor", "PrometheusRule", "NetworkPolicy"}
    assert kinds["PrometheusRule"]["spec"] == RULES
    assert {manifest["metadata"]["namespace"] for manifest in kinds.values()} == {"cifake-ray"}
    monitor, policy = kinds["PodMonitor"]["spec"], kinds["NetworkPolicy"]["spec"]
    # KubeRay labels every pod of Ray so, and gives each a port of this name and number.
    assert monitor["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]
    assert policy["podSelector"] == monitor["selector"]
    [rule] = policy["ingress"]
    assert rule["ports"] == [{"port": 8080, "protocol": "TCP"}]
    [who] = rule["from"]
    assert who.keys() == {"namespaceSelector", "podSelector"}, "nobody but Prometheus"
    kubernetes_validate.validate(kinds["NetworkPolicy"], "1.33", strict=True)


def test_no_pod_says_otherwise_about_the_port() -> None:
    text = (PROJECT / "deploy" / "kuberay" / "base" / "cluster.yaml").read_text()
    assert not re.search(r"metrics-export-port|name: metrics\b|8080", text)


def test_kustomize_prints_these_manifests() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(FOLDER / "kuberay")]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    by_kind = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}
    assert by_kind == {manifest["kind"]: manifest for manifest in render(FOLDER / "kuberay")}
