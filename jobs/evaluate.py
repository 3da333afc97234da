r"""Labelled shards and a bundle -> metrics and a report.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/evaluate.py /data/shards --bundle /data/run --out /data/report

Paths must mean the same place on every node: an `s3://` bucket, or a file system that all see. The
options are those of `cifake-ray evaluate --help`.
"""

from cifake_ray.__main__ import main

main("evaluate")
