r"""Shards -> the best of many trainings.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/tune.py /data/shards /data/run --search augmentation --trials 64

Paths must mean the same place on every node: an `s3://` bucket, or a file system that all see. The
options are those of `cifake-ray tune --help`.
"""

from cifake_ray.__main__ import main

main("tune")
