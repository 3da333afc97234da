"""What lies beside images on real disks and is no image: the names that a listing leaves out.

The names alone decide, since nothing that is listed is read. Lists are not asked: they name each
image. Archives and other files that may hold images are no clutter: they become rows that say so.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Of macOS; Synology, QNAP and other NAS; Windows; Linux; what synchronises; viewers; tools.
_FOLDERS = """
__macosx .appledouble .appledb .fseventsd .spotlight-v100 .temporaryitems .trashes .trash
.documentrevisions-v100
@eadir #recycle #snapshot @recycle @recently-snapshot .@__thumb @__thumb @tmp .wdmc .snapshot .zfs
$recycle.bin recycler lost+found .thumbnails .cache
.dropbox.cache .stfolder .stversions .sync
.picasaoriginals .dtrash .xvpics .thumb .tmb
.ipynb_checkpoints __pycache__ .git .hg .svn .dvc .idea .vscode .venv node_modules
.pytest_cache .mypy_cache .ruff_cache
"""
_FILES = """
.ds_store .localized .apdisk .volumeicon.icns thumbs.db ehthumbs.db ehthumbs_vista.db desktop.ini
.directory .picasa.ini picasa.ini .dropbox .nomedia .bridgesort .bridgelabelsandratings
zbthumbnail.info pspbrwse.jbf albumart.pamp thumbs.db:encryptable _success
.gitignore .gitattributes .gitkeep .gitmodules .keep .dockerignore
"""
# Captions, metadata and labels; checksums, code and notes; what cameras, editors and maps add;
# weights of networks.
_SIDECARS = """
txt json jsonl ndjson xml csv tsv md rst yaml yml toml ini cfg log npy npz mat pkl pickle html htm
css js py ipynb sh caption tags sha1 sha256 sha512 md5 sfv url lnk lock db sqlite xls xlsx ods doc
docx odt ppt pptx xmp aae pp3 dop lrcat ctg gpx kml srt jgw tfw pgw prj geojson crc dvc swp c cpp h
java pt pth ckpt onnx safetensors
"""
# Of a telephone each photograph may have a film beside it; .thm and .lrv are what cameras add.
_MEDIA = """
mov mp4 m4v 3gp avi mkv webm mts m2ts mpg mpeg wmv lrv thm mp3 m4a wav aac ogg flac
"""
_SIDECAR_FILES = """
readme license licence copying notice sha256sums md5sums md5sum makefile dockerfile
"""

SYSTEM_FOLDERS = frozenset({*_FOLDERS.split(), "system volume information"})
SYSTEM_FILES = frozenset({*_FILES.split(), "icon\r"})
SYSTEM_PREFIXES = ("._", "~$", ".nfs0", ".fuse_hidden")  # of files
SIDECAR_SUFFIXES = frozenset(_SIDECARS.split())
MEDIA_SUFFIXES = frozenset(_MEDIA.split())
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")  # sidecars with labels, by `imagefolder`
SIDECAR_FILES = frozenset(_SIDECAR_FILES.split())
# Of every name that may be clutter, but for those that start with a dot or a tilde.
CLUTTER_SUFFIXES = frozenset(
    {*SIDECAR_SUFFIXES, *MEDIA_SUFFIXES, "gz"}
    | {name.rpartition(".")[2] for name in (*SYSTEM_FILES, *SIDECAR_FILES)}
)


def find_clutter(key: str) -> str | None:
    """Return why the name of a file is that of no image, or None."""
    folder, _, name = key.rpartition("/")
    if folder and is_system_folder(folder):
        return "in a system folder"
    name = name.lower()
    if name in SYSTEM_FILES or name.startswith(SYSTEM_PREFIXES):
        return "system file"
    stem, dot, suffix = name.rpartition(".")
    if suffix == "gz":
        stem, dot, suffix = stem.rpartition(".")
    if dot and suffix in MEDIA_SUFFIXES:
        return "video or sound"
    if (dot and suffix in SIDECAR_SUFFIXES) or name in SIDECAR_FILES:
        return "sidecar"
    return None


@lru_cache(maxsize=1024)  # neighbours lie in the same folder
def is_system_folder(folder: str) -> bool:
    """Return whether a path of folders leads through one of the system or of a tool."""
    return any(
        name in SYSTEM_FOLDERS or name.startswith(".trash-") for name in folder.lower().split("/")
    )


def may_be_clutter(names: pa.Array) -> np.ndarray:
    """Return for each name of a file whether `find_clutter` might say that it is none of an image.

    False is certain, at a tenth of its time: what has to be looked at are suffixes.
    """
    starts = pc.or_(pc.starts_with(names, "."), pc.starts_with(names, "~"))
    suffixes = partition_last(names, ".")[1].dictionary_encode()
    known = [suffix.lower() in CLUTTER_SUFFIXES for suffix in suffixes.dictionary.to_pylist()]
    is_known = pa.array(known, pa.bool_()).take(suffixes.indices)
    mask: np.ndarray = pc.or_(starts, is_known).to_numpy(zero_copy_only=False)
    return mask


def partition_last(texts: pa.Array, separator: str) -> tuple[pa.Array, pa.Array]:
    """Return what `str.rpartition` has first and last, but the first begins with the separator."""
    parts = pc.binary_join_element_wise("", texts, separator)  # so that there are two of each
    parts = pc.split_pattern(parts, separator, max_splits=1, reverse=True)
    return pc.list_element(parts, 0), pc.list_element(parts, 1)
