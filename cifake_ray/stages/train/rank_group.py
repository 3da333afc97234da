"""What Ray Train's controller knows of a training: how ranks start, meet, and end for good.

It imports no torch, which the controller would otherwise do for seconds before the first worker
starts. On a Ray of this machine the ranks meet in a file. Where they usually meet, at a port of
rank 0, any machine may read and write, without a token.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.worker import global_worker
from ray.train.backend import Backend, BackendConfig

from cifake_ray.config import TrainConfig
from cifake_ray.errors import CacheError, CifakeError, StorageError

LEAVE_TIMEOUT_S = 30.0  # as Ray Train has


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """Task of a worker of Ray Train."""

    config: TrainConfig
    rows_hash: str  # of the rows that the driver found
    use_gpu: bool
    num_threads: int
    teacher: str | None = None  # what identifies the teachers that the driver loaded


def start_rank(loop_config: dict[str, RankTask]) -> None:
    """Prepare and train in a process of Ray Train.

    CifakeError when the shards or the teachers are not those of the driver.
    """
    import torch

    from cifake_ray.stages.train.prepare import prepare_training
    from cifake_ray.stages.train.progress import send_to_driver
    from cifake_ray.stages.train.worker import train_rank

    task = loop_config["task"]
    torch.set_num_threads(task.num_threads)
    prepared = prepare_training(task.config)
    if prepared.rows_hash != task.rows_hash:
        raise CifakeError(
            f"{task.config.shards}: the shards changed while the training started; run the same"
            " command again once they are complete"
        )
    if prepared.settings["teacher"] != task.teacher:
        raise CifakeError(
            f"--teacher {task.config.teacher}: a worker found another bundle there than the driver;"
            " give a path that leads every node to the same one"
        )
    send = partial(send_to_driver, task.config.run)
    train_rank(prepared, use_gpu=task.use_gpu, num_threads=task.num_threads, send=send)


@dataclass
class RankGroup(BackendConfig):
    """Processes of torch that meet in a file where Ray is on loopback."""

    backend: str | None = None  # "nccl" or "gloo"; TorchTrainer chooses

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch import TorchConfig

        return TorchConfig().train_func_context


class _Backend(Backend):
    share_cuda_visible_devices = True  # as Ray Train's own for torch

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the ranks, as Ray Train does but for where they meet."""
        if not ray.get_runtime_context().gcs_address.startswith("127.0.0.1:"):
            from ray.train.torch import TorchConfig

            config = TorchConfig(backend=backend_config.backend)
            config.backend_cls().on_start(worker_group, config)
            return
        # A folder of mode 700; each group must have a file of its own.
        node: Any = global_worker.node
        folder = tempfile.mkdtemp(prefix="ranks-", dir=node.get_session_dir_path())
        joins = [
            worker_group.execute_single_async(
                rank,
                _join_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=(Path(folder) / "group").as_uri(),
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        leaves = worker_group.execute_async(_leave_group, len(worker_group) > 1)
        with suppress(ray.exceptions.GetTimeoutError):
            ray.get(leaves, timeout=LEAVE_TIMEOUT_S)


def _join_group(**options: Any) -> None:
    from ray.train.torch import config

    config._set_torch_distributed_env_vars()  # type: ignore[no-untyped-call]
    config._setup_torch_process_group(**options)


def _leave_group(is_group: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=is_group)  # type: ignore[no-untyped-call]


class EndAtOnce(ray.train.UserCallback):
    """Ends a training, instead of starting it again, for what every attempt would meet."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in map(unwrap_failure, worker_exceptions.values()):
            may_pass = isinstance(failure, StorageError) and not isinstance(failure, CacheError)
            if isinstance(failure, CifakeError) and not may_pass:
                raise failure  # Ray Train repeats no attempt that a callback ended


def unwrap_failure(failure: Exception) -> BaseException:
    """Return what a worker raised; Ray Train wraps it to keep the text of its traceback."""
    return getattr(failure, "_base_exc", failure)
