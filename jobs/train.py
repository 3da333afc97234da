r"""Shards -> a detector, data-parallel.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/train.py /data/shards /data/run --model cnn --num-workers 4

Paths must mean the same place on every node: an `s3://` bucket, or a file system that all see. The
options are those of `cifake-ray train --help`.
"""

from cifake_ray.__main__ import main

main("train")
