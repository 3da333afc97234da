r"""Convert, train, evaluate and score below one root.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/pipeline.py /data/images /data/root

Paths must mean the same place on every node: an `s3://` bucket, or a file system that all see. The
options are those of `cifake-ray pipeline --help`.
"""

from cifake_ray.__main__ import main

main("pipeline")
