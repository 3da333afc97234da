"""Documented fields, their checks, and the options that all verbs share."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from cifake_ray.errors import UsageError, suggest_word

Device = Literal["auto", "cpu", "cuda"]
ScorePrecision = Literal["auto", "float32", "tf32", "bf16", "fp16", "int8"]
SquareFit = Literal["resize", "crop"]  # one square for an image
Fit = Literal["resize", "crop", "crops"]
MAX_IMAGE_SIZE = 4096  # pixels: the largest side a detector may ask for
MAX_CROP_SIZE = 1024  # pixels of a side, to train on
NUM_CROPS, MAX_NUM_CROPS = 12, 64  # of an image, with the fit "crops": the default and the most


@dataclass(frozen=True)
class Doc:
    """Help line of a field; `positional` makes the field an argument."""

    help: str
    positional: bool = False
    in_fingerprint = True


class RuntimeDoc(Doc):
    """Help line of a field outside the fingerprint: how, where and how fast a run goes; retries."""

    in_fingerprint = False


TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "nothing",
}


def check(condition: bool, message: str) -> None:
    """Raise UsageError unless the condition holds."""
    if not condition:
        raise UsageError(message)


def find_misfit(config_class: type, name: str, value: object) -> str | None:
    """Return `is 'adam'; give adamw or sgd` if a value is not of a field's type, else None."""
    hint = hint_of(config_class, name)
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if any(_fits(kind, value) for kind in kinds):
        return None
    if get_origin(hint) is tuple and isinstance(value, tuple):  # then one of its items does not
        kinds = get_args(hint)[:1]
    words = [
        word
        for kind in kinds
        if not is_dataclass(kind)  # on the command line it is text
        for word in (
            get_args(kind) if get_origin(kind) is Literal else [TYPE_WORDS.get(kind, "a tuple")]
        )
    ]
    given = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    guess = suggest_word(str(given), set(words) - set(TYPE_WORDS.values()))
    return f"is {given!r}; give {' or '.join(words)}{guess}"


def _fits(kind: Any, value: object) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool):  # for Python a whole number
        return kind is bool
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(get_args(kind)[0], v) for v in value)
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def check_least(config: object, least: int, *names: str) -> None:
    """Raise UsageError unless each field is None, or finite and at least `least`."""
    for name in names:
        value = getattr(config, name)
        check(
            value is None or least <= value < math.inf,
            f"--{name.replace('_', '-')} is {value}; give {least} or more",
        )


S3_SERVER = "the server; credentials come from the AWS chain, never from a URL"


def check_endpoint(url: str | None, name: str, what: str = S3_SERVER) -> None:
    """Raise UsageError, without the URL in it, for a URL that is not a server, or a path on one."""
    check(
        url is None or re.fullmatch(r"https?://[^@?#/\s]+(/[^@?#\s]*)?", url) is not None,
        f"{name}: give http://HOST:PORT or https://HOST, {what}",
    )


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Options for reaching buckets. Credentials come from the AWS chain, never from options."""

    PANEL: ClassVar[str] = "S3"  # on the help page

    s3_endpoint_url: Annotated[
        str | None, RuntimeDoc("Server of s3:// (default: AWS_ENDPOINT_URL, else AWS)")
    ] = None
    s3_region: Annotated[
        str | None, RuntimeDoc("Region of the bucket (default: AWS_REGION, else detected)")
    ] = None
    s3_profile: Annotated[
        str | None, RuntimeDoc("Profile in the AWS configuration (default: AWS_PROFILE)")
    ] = None
    s3_anonymous: Annotated[bool, RuntimeDoc("Use no credentials, for public buckets")] = False
    s3_requester_pays: Annotated[
        bool, RuntimeDoc("Pay for the requests to a bucket whose readers pay")
    ] = False
    s3_max_requests_per_s: Annotated[
        float | None,
        RuntimeDoc("Most reads of images per second by all workers (default: what S3 takes)"),
    ] = None

    def __post_init__(self) -> None:
        for field in fields(self):
            misfit = find_misfit(type(self), field.name, getattr(self, field.name))
            check(misfit is None, f"--{field.name.replace('_', '-')} {misfit}")
        check_endpoint(self.s3_endpoint_url, "--s3-endpoint-url")
        check_least(self, 1, "s3_max_requests_per_s")

    @property
    def store(self) -> StoreConfig:
        """Return these fields alone, as they are sent to the workers."""
        return StoreConfig(**{f.name: getattr(self, f.name) for f in fields(StoreConfig)})


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(StoreConfig):
    """Options for where a command runs."""

    PANEL: ClassVar[str] = "Cluster"

    address: Annotated[
        str | None,
        RuntimeDoc("Address of a Ray cluster (default: RAY_ADDRESS, else this machine)"),
    ] = None
    scale_timeout_s: Annotated[
        float, RuntimeDoc("Ask the autoscaler for missing workers and wait this many seconds")
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "scale_timeout_s")

    @property
    def cluster(self) -> ClusterConfig:
        """Return these fields alone, for another verb on the same cluster."""
        return ClusterConfig(**{f.name: getattr(self, f.name) for f in fields(ClusterConfig)})


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(ClusterConfig):
    """Options of the verbs that divide their work into items."""

    PANEL: ClassVar[str] = "Run"

    num_workers: Annotated[
        int | None,
        RuntimeDoc(
            "Workers of Ray, each with a CPU or a GPU; 0: a process per CPU or GPU of this machine,"
            " without Ray (default: 0 if no cluster is named and no GPU used, else as many as fit)"
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "num_workers")


def doc_of(config_class: type, name: str) -> Doc:
    """Return the `Doc` of a field."""
    doc: Doc = _list_hints(config_class)[name].__metadata__[0]
    return doc


def hint_of(config_class: type, name: str) -> Any:
    """Return the type of a field, without its `Doc`."""
    return _list_hints(config_class)[name].__origin__


@cache
def _list_hints(config_class: type) -> dict[str, Any]:
    return get_type_hints(config_class, include_extras=True)


def find_panel(config_class: type, name: str) -> tuple[int, str]:
    """Return where a field stands on the help page: its class's distance, and the panel's title.

    A class may sort its fields into `PANELS`; what does not change the result is in `Run`.
    """
    for distance, owner in enumerate(config_class.__mro__):
        if name in vars(owner).get("__annotations__", {}):
            panels: dict[str, str] = vars(owner).get("PANELS", {})
            for title, names in panels.items():
                if name in names.split():
                    return distance, title
            title = vars(owner).get("PANEL", "Options")
            is_run = not doc_of(config_class, name).in_fingerprint and title not in LAST_PANELS
            return distance, "Run" if is_run else title
    raise KeyError(name)


LAST_PANELS = ("Run", "S3", "Cluster")  # behind a verb's own, in this order


def fingerprint_settings(config: Any) -> dict[str, Any]:
    """Return the fields that change a row of the result: those a run's fingerprint covers."""
    values = asdict(config)
    return {
        f.name: list(values[f.name]) if isinstance(values[f.name], tuple) else values[f.name]
        for f in fields(config)
        if doc_of(type(config), f.name).in_fingerprint
    }


def list_options(config: Any) -> list[str]:
    """Return the command-line words that make a config: everything that differs from the defaults.

    UsageError for a None that no option can express.
    """
    arguments: list[str] = []
    options: list[str] = []
    for field in fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if doc_of(type(config), field.name).positional:
            arguments += value if isinstance(value, tuple) else [value]
        elif isinstance(value, bool) and value != field.default:
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != field.default:
            check(value is not None, f"{field.name}: no command-line option sets it to None")
            for item in value if isinstance(value, tuple) else [value]:
                options += [f"--{flag}", str(item)]
    return [*arguments, *options]
