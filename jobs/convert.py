r"""Images -> Parquet shards.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/convert.py /data/images /data/shards

Paths must mean the same place on every node: an `s3://` bucket, or a file system that all see. The
options are those of `cifake-ray convert --help`.
"""

from cifake_ray.__main__ import main

main("convert")
