r"""Images -> scores, with a bundle.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/score.py /data/images /data/scores --bundle /data/run

Paths must mean the same place on every node: an `s3://` bucket, or a file system that all see. The
options are those of `cifake-ray score --help`.
"""

from cifake_ray.__main__ import main

main("score")
