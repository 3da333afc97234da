"""Let the ranks of a training on a Ray of this machine meet in a file.

Where they usually meet, at a port of rank 0, any machine may read and write, without a token.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.train.torch.config import (
    TorchConfig,
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)


@dataclass
class RankGroup(TorchConfig):
    """Processes of torch that meet in a file where Ray is on loopback."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the ranks, as Ray Train does but for where they meet."""
        if not ray.get_runtime_context().gcs_address.startswith("127.0.0.1:"):
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        has_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        # A folder of mode 700; each group must have a file of its own.
        node: Any = global_worker.node
        folder = tempfile.mkdtemp(prefix="ranks-", dir=node.get_session_dir_path())
        joins = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend="nccl" if has_gpus else "gloo",
                world_rank=rank,
                world_size=len(worker_group),
                init_method=(Path(folder) / "group").as_uri(),
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joins)
