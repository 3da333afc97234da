"""Images that do not decode: what one rank has met, all of them know."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing

from cifake_ray.core.training.share_errors import share_errors

MET = ({3: "truncated", 7: "not_an_image"}, {7: "not_an_image", 0: "empty"})


def run_rank(rank: int, folder: str) -> None:
    if sys.platform == "linux":  # where the host's own name need not resolve
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    nothing: dict[int, str] = {}
    share_errors(nothing, 10, "cpu")
    assert nothing == {}
    errors = dict(MET[rank])
    share_errors(errors, 10, "cpu")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(sorted(errors.items())))
    dist.barrier()
    dist.destroy_process_group()


def test_every_rank_knows_the_errors_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    expected = [[0, "empty"], [3, "truncated"], [7, "not_an_image"]]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_one_process_keeps_its_own() -> None:
    errors = dict(MET[0])
    share_errors(errors, 10, "cpu")
    assert errors == MET[0]
