r"""Images -> Parquet shards.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/convert.py /data/images /data/shards

Paths must mean the same place on every node: a shared file system. The options are those of
`cifake-ray convert --help`.
"""

from cifake_ray.cli import main

main("convert")
