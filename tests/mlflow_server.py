"""MLflow's tracking server, as far as a training speaks to it, on a real store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.utils.proto_json_utils import message_to_json


def _log_batch(store: MlflowClient, q: dict[str, Any]) -> dict[str, Any]:
    store.log_batch(
        q["run_id"],
        [Metric(m["key"], m["value"], m["timestamp"], m["step"]) for m in q.get("metrics", [])],
        [Param(p["key"], p["value"]) for p in q.get("params", [])],
        [RunTag(t["key"], t["value"]) for t in q.get("tags", [])],
    )
    return {}


def _find_experiment(store: MlflowClient, q: dict[str, Any]) -> dict[str, Any]:
    found = store.get_experiment_by_name(q["experiment_name"])
    if found is None:
        raise MlflowException("no such experiment", RESOURCE_DOES_NOT_EXIST)
    return {"experiment": _to_dict(found)}


def _update_run(store: MlflowClient, q: dict[str, Any]) -> dict[str, Any]:
    status = q["status"]
    store.update_run(
        q["run_id"], status=status if isinstance(status, str) else RunStatus.to_string(status)
    )
    return {"run_info": _to_dict(store.get_run(q["run_id"]).info)}


def _to_dict(entity: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(message_to_json(entity.to_proto()))
    return value


ANSWERS: dict[str, Callable[[MlflowClient, dict[str, Any]], dict[str, Any]]] = {
    "experiments/get-by-name": _find_experiment,
    "experiments/create": lambda store, q: {"experiment_id": store.create_experiment(q["name"])},
    "runs/create": lambda store, q: {
        "run": _to_dict(store.create_run(q["experiment_id"], run_name=q.get("run_name")))
    },
    "runs/get": lambda store, q: {"run": _to_dict(store.get_run(q["run_id"]))},
    "runs/log-batch": _log_batch,
    "runs/set-tag": lambda store, q: store.set_tag(q["run_id"], q["key"], q["value"]) or {},
    "runs/update": _update_run,
    "metrics/get-history": lambda store, q: {
        "metrics": [_to_dict(m) for m in store.get_metric_history(q["run_id"], q["metric_key"])]
    },
}


class MlflowServer(ThreadingHTTPServer):
    """`loses_answers` lets it do what it is asked and say nothing of it."""

    daemon_threads = True
    loses_answers = False

    def __init__(self, store_uri: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.store = MlflowClient(store_uri)
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: MlflowServer

    def do_GET(self) -> None:
        self._answer(dict(parse_qsl(urlsplit(self.path).query)))

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, query: dict[str, Any]) -> None:
        name = urlsplit(self.path).path.partition("/mlflow/")[2]
        try:
            code, answer = 200, ANSWERS[name](self.server.store, query)
        except MlflowException as error:
            code, answer = error.get_http_status_code(), json.loads(error.serialize_as_json())
        except KeyError:
            code, answer = 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": name}
        if self.server.loses_answers:
            self.close_connection = True
            return
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def run_mlflow_server(store_uri: str, port: int = 0) -> Iterator[MlflowServer]:
    """A server on loopback until the block ends or `shutdown` and `server_close` are called."""
    with MlflowServer(store_uri, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
