"""What fits where, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from cifake_ray.errors import ResourceError
from cifake_ray.stages.cluster import Node, Placement, Resources, _check_address, place_workers


def place(nodes: list[tuple[int, int]], **options: object) -> Placement:
    defaults = {"num_workers": 1, "use_gpu": False, "cpus_per_worker": None}
    resources = Resources(tuple(Node(*node) for node in nodes))
    return place_workers(resources, **{**defaults, **options})  # type: ignore[arg-type]


def test_one_worker_gets_the_cpus_of_the_largest_node() -> None:
    assert place([(2, 0), (8, 0)]) == Placement(1, 8, 0)


def test_a_worker_is_never_spread_over_two_nodes() -> None:
    assert place([(3, 0), (3, 0)], num_workers=3) == Placement(3, 1, 0)
    assert place([(3, 0), (3, 0)], num_workers=2) == Placement(2, 3, 0)


def test_gpus_are_placed_where_there_are_cpus_for_them() -> None:
    assert place([(8, 4), (8, 0)], num_workers=4, use_gpu=True) == Placement(4, 2, 1)
    with pytest.raises(ResourceError, match="need 5 CPUs and 5 GPUs, the cluster has 16 CPUs"):
        place([(8, 4), (8, 0)], num_workers=5, use_gpu=True)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ResourceError, match="3 workers need 3 CPUs, the cluster has 2 CPUs"):
        place([(2, 0)], num_workers=3)
    with pytest.raises(ResourceError, match="1 workers need 4 CPUs"):
        place([(2, 0), (2, 0)], num_workers=1, cpus_per_worker=4)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at .127\.0\.0\.1:1"):
        _check_address("127.0.0.1:1")
