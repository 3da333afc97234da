"""Define the labels, the error names and the columns of every table on disk."""

from __future__ import annotations

import json

import pyarrow as pa

SCHEMA_VERSION = 1
FOOTER_KEY = b"cifake_ray"  # in the footer of every result file, and of no other
SEAL_KEY = b"cifake_ray_seal"  # written last: only then it is known what is before the footer

REAL, FAKE = 0, 1  # FAKE is the positive class everywhere
LABEL_NAMES = ("REAL", "FAKE")
SPLITS = ("train", "val", "test")

IMAGE_ERRORS = (
    "not_found",  # listed, gone when read
    "changed",  # listed with another size, time or etag
    "denied",  # the store refused this key
    "io_throttled",  # the store still asked to slow down after the last retry
    "io_network",  # the connection still failed after the last retry
    "too_large",  # more bytes than MAX_IMAGE_BYTES
    "too_many_pixels",  # more than MAX_IMAGE_PIXELS, in a JPEG than MAX_JPEG_PIXELS
    "empty",  # zero bytes
    "not_an_image",  # no decoder knows the bytes
    "format_not_allowed",  # a picture or film in a format we do not decode; error_detail names it
    "truncated",  # the image data ends early
    "decode_failed",  # any other exception of a decoder; error_detail names it
    "bad_key",  # the name is not valid UTF-8
    "worker_crash",  # the decoder killed its process each time
    "nan_score",  # the detector gave no finite logit
)

# Transient errors, which `--retry-errors` retries. A decoder may have crashed for lack of memory,
# or may have been fixed since.
RETRYABLE_ERRORS = ("denied", "io_throttled", "io_network", "worker_crash")

# Known before the bytes are read. A row of the manifest adds where to find them.
LABEL_FIELDS = [
    pa.field("label", pa.int64()),  # REAL or FAKE; int64 because datasets.ClassLabel needs it
    pa.field("split", pa.string()),
    pa.field("source", pa.string()),  # generator or camera set
]
ERROR_FIELDS = [pa.field("error", pa.string()), pa.field("error_detail", pa.string())]

# From the header of an image.
HEADER_FIELDS = [
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("mode", pa.string()),
    pa.field("jpeg_quality", pa.int16()),
    pa.field("num_frames", pa.int32()),
]

SHARD_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    *LABEL_FIELDS,
    *HEADER_FIELDS,
    pa.field("sha256", pa.binary(32)),
    *ERROR_FIELDS,
]

SCORE_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("logit", pa.float32()),
    pa.field("p_fake", pa.float32()),
    pa.field("is_fake", pa.bool_()),
    *ERROR_FIELDS,
    *HEADER_FIELDS,
    *LABEL_FIELDS,
]

# Behind SCORE_FIELDS when the bundle has the fit "crops", whose mean logit `logit` is.
CROP_FIELDS = [
    pa.field("num_crops", pa.int32()),
    pa.field("crop_logit_std", pa.float32()),  # of the population: 0 for a single crop
]

# Behind SCORE_FIELDS with `score --provenance`: what metadata claims, never part of a verdict. All
# are null where the image has an error; else null means that nothing was found.
PROVENANCE_FIELDS = [
    pa.field("c2pa_present", pa.bool_()),  # null: not looked for in this format (GIF, BMP)
    # Below null without a manifest; trust and issuer also without encypher-c2pa.
    pa.field("c2pa_binding", pa.string()),  # match, mismatch, unknown: is it of this very image
    pa.field("c2pa_trust", pa.string()),  # trusted, untrusted, unknown: who signed it
    pa.field("c2pa_issuer", pa.string()),  # of the certificate that signed it
    pa.field("digital_source_type", pa.string()),  # IPTC's term, from XMP or C2PA's actions
    pa.field("generator", pa.string()),  # NAME: MODEL from its settings, or a name of software
    pa.field("tc260_label", pa.string()),  # of China's TC260: 1 generated, 2 possibly, 3 suspected
    # What is there but could not be read, or not whole: c2pa, container, exif, xmp.
    pa.field("provenance_unread", pa.string()),
]

# What audit measures of an image beside its header.
PIXEL_STATISTICS = (
    *(f"{statistic}_{name}" for statistic in ("mean", "std") for name in ("red", "green", "blue")),
    *("laplacian", "saturation", "grey_share", "clipped_share"),
)
MEASURED_FIELDS = [
    pa.field("size_bytes", pa.int64()),
    pa.field("quantization", pa.string()),
    pa.field("subsampling", pa.string()),
    pa.field("is_progressive", pa.bool_()),
    *(pa.field(f"{name}_bytes", pa.int32()) for name in ("exif", "xmp", "icc", "text")),
    *(pa.field(name, pa.float32()) for name in PIXEL_STATISTICS),
    pa.field("sha256", pa.binary(32)),
    pa.field("pixels_sha256", pa.binary(32)),
    pa.field("phash", pa.uint64()),
    pa.field("thumbnail", pa.binary()),
]
AUDIT_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    *LABEL_FIELDS,
    *HEADER_FIELDS,
    *MEASURED_FIELDS,
    *ERROR_FIELDS,
]

# What `score --thumbnails` adds; null where the image has no score.
THUMBNAIL_FIELD = pa.field("thumbnail_webp", pa.binary())

MANIFEST_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    # A path below the source root, an absolute path, or s3://BUCKET/KEY with the key as it is:
    # split at the first slash after the bucket and never parsed as a URI.
    pa.field("location", pa.string()),
    # Inside `location`: the row of a Parquet file, the first byte of a member of a tar.
    pa.field("row", pa.int64()),
    pa.field("size_bytes", pa.int64()),
    pa.field("mtime_ns", pa.int64()),
    # Of an object, as the store lists it, quotes included; of a row of Parquet, a stamp
    # of its file.
    pa.field("etag", pa.string()),
    *LABEL_FIELDS,
    pa.field("error", pa.string()),  # known bad from the listing alone: bad_key
]


def shard_name(shard: int) -> str:
    """Return `part-00042.parquet` for shard 42; no other files are named `part-*`."""
    return f"part-{shard:05d}.parquet"


def datasets_metadata(schema: pa.Schema) -> dict[bytes, bytes]:
    """Return the footer entry that makes Hugging Face `datasets` show images and class names.

    Source: `datasets.Features._from_yaml_list` / `Features.arrow_schema`, key `huggingface`.
    """
    named: dict[str, dict[str, object]] = {
        "image": {"_type": "Image"},
        "label": {"names": list(LABEL_NAMES), "_type": "ClassLabel"},
    }
    features: dict[str, dict[str, object]] = {}
    for field in schema:
        dtype = "binary" if pa.types.is_fixed_size_binary(field.type) else str(field.type)
        features[field.name] = named.get(field.name, {"dtype": dtype, "_type": "Value"})
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
