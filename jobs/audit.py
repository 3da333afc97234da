r"""Labelled images -> what gives their labels away, and their duplicates.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python jobs/audit.py /data/images /data/audited

Paths must mean the same place on every node: an `s3://` bucket, or a file system that all see. The
options are those of `cifake-ray audit --help`.
"""

from cifake_ray.__main__ import main

main("audit")
