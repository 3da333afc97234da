"""Another user of the machine, or another machine, meets a Ray that a command has started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from faults.command import end_command, start_command, wait_until

pytestmark = pytest.mark.timeout(600)

CLOSED_PATHS = ("/api/job_agent/jobs/", "/get_or_create_runtime_env", "/logs")

STRANGER = f"""
import json, os, sys, urllib.error, urllib.request
import encodings.idna, grpc, grpc._channel, grpc._utilities

ports, methods, folder = json.load(sys.stdin)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)


def call(port):
    channel = grpc.insecure_channel(f"127.0.0.1:{{port}}")
    try:
        grpc.channel_ready_future(channel).result(timeout=5)
    except grpc.FutureTimeoutError:
        return None
    answers = {{}}
    for method in methods:
        try:
            channel.unary_unary(method)(b"", timeout=20)
            answer = "OK"
        except grpc.RpcError as error:
            answer = error.code().name
        answers.setdefault(answer, []).append(method)
    return answers


def ask(port, path):
    url = f"http://127.0.0.1:{{port}}{{path}}"
    request = urllib.request.Request(url, data=b"{{}}", method="POST")
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


found = {{}}
for port in ports:
    found[port] = call(port)
    if found[port] is None:
        found[port] = {{path: ask(port, path) for path in {CLOSED_PATHS}}}
seen = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
print(json.dumps([found, seen]))
"""


def find_listeners(pid: int) -> dict[tuple[str, int], str]:
    """Address and port of every socket that a command or its Ray listens on, with its process."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {
        tuple(listener.laddr): process.name()
        for process in processes
        for listener in process.net_connections("tcp")
        if listener.status == psutil.CONN_LISTEN
    }


def list_methods() -> list[str]:
    """Whatever Ray's own processes may be asked for."""
    folder = Path(ray.__file__).parent
    binaries = ("core/src/ray/raylet/raylet", "core/src/ray/gcs/gcs_server", "_raylet.so")
    found = {
        m for b in binaries for m in re.findall(rb"/ray\.rpc\.\w+/\w+", (folder / b).read_bytes())
    }
    return sorted(method.decode() for method in found)


def meet_a_stranger(ports: list[int], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Answers at ports, and files below a folder, for another user (if this is root), tokenless."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER],
        input=json.dumps([ports, list_methods(), str(folder)]),
        env={**env, "HOME": "/"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stranger.returncode == 0, stranger.stderr
    found, seen = json.loads(stranger.stdout)
    return found, seen


def test_no_other_user_and_no_other_machine_gets_in(
    clean: dict[str, Path], own_ray: dict[str, str], tmp_path: Path
) -> None:
    """While two ranks train: only loopback listens, and whoever has no token is refused."""
    run, home = tmp_path / "run", tmp_path / "home"
    words = ["train", str(clean["convert"]), str(run), "--num-workers", "2", "--epochs", "500"]
    with tempfile.TemporaryDirectory(prefix="ray-") as shared:  # names of sockets must be short
        os.chmod(shared, 0o777)
        env = {**own_ray, "RAY_TMPDIR": shared, "HOME": str(home)}
        process = start_command([*words, "--cache-dir", str(tmp_path / "cache")], env)
        wait_until(lambda: process.poll() is not None or (run / "history.jsonl").exists())
        listeners = find_listeners(process.pid)
        found, seen = meet_a_stranger([port for _, port in listeners], Path(shared))
        assert [path for path in Path(shared).rglob("sockets/*") if path.is_socket()]
        process.terminate()
        code, _, errors = end_command(process)
        assert code == 143, errors
    assert {address.removeprefix("::ffff:") for address, _ in listeners} == {"127.0.0.1"}
    refused = set[str]()
    for (_, port), name in listeners.items():
        answers = found[str(port)]
        if "UNIMPLEMENTED" in answers:
            assert answers.keys() <= {"UNIMPLEMENTED", "UNAUTHENTICATED"}, (name, answers)
            refused.update(answers.get("UNAUTHENTICATED", []))
        else:  # 405 where numbers for Prometheus are read, None of a socket between ranks
            assert set(answers.values()) <= {401, 405, None}, (name, answers)
    assert {
        "/ray.rpc.InternalKVGcsService/InternalKVPut",
        "/ray.rpc.NodeManagerService/RequestWorkerLease",
        "/ray.rpc.CoreWorkerService/PushTask",
    } <= refused
    assert not seen or os.getuid() != 0
    assert not (home / ".ray").exists(), "a token is on the disk"
