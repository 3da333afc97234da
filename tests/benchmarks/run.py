"""Compare cifake-ray with its peers: one Markdown table per command.

    python tests/benchmarks/run.py [convert score train memory sample] [--images N] [--source DIR]

Every figure comes from a fresh process. Peers take turns within each repeat, because machines are
noisy; ratios are to the bare loop of the same repeat, and all figures are medians over the repeats.
"From process start" lasts until the process ends; "steady" is timed by the command itself: first
work to last commit, for training the last epoch. Files are in the page cache.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from measure import Result, link_images, run_command, unpack_cifake

HERE = Path(__file__).parent
NUM_CORES = len(os.sched_getaffinity(0))
EPOCHS = "2"  # the first warms up
MEMORY_IMAGES = 10_000
MEMORY_LIMIT_MB = 64


@dataclass(frozen=True)
class Contender:
    """A row of a table; `bare` names the row it is compared with."""

    name: str
    make_command: Callable[[Path], list[str]]
    bare: str = "bare loop"


def run_ours(*arguments: str) -> Callable[[Path], list[str]]:
    """`cifake-ray VERB [SRC] OUT ...`, with OUT put in for `{out}`."""
    words = [sys.executable, "-m", "cifake_ray", *arguments, "--json"]
    return lambda out: [word.format(out=out) for word in words]


def run_peer(script: str, source: Path, *arguments: str) -> Callable[[Path], list[str]]:
    path = str(HERE / "peers" / script)
    return lambda out: [sys.executable, path, str(source), str(out), *arguments]


def share_cores(num_processes: int) -> tuple[str, str]:
    """Return threads and loader processes for each of timm's processes.

    On two cores, the fastest of 1 or 2 threads with 0, 1 or 2 loaders.
    """
    cores = NUM_CORES // num_processes
    return str(max(1, cores // 2)), str(cores if cores > 1 else 0)


class Bench:
    """A run of the benchmarks: folders, made when first needed, and results."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.results: dict[str, dict[str, list[Result]]] = {}

    def images(self, num_images: int) -> Path:
        folder = self.work / f"images-{num_images}"
        if folder.exists():
            return folder
        if self.source is not None:
            return link_images(self.source, folder, num_images)
        from cifake_ray.config import SampleConfig
        from cifake_ray.storage.datasets.sample_folder import write_sample

        return write_sample(SampleConfig(out=str(folder), images=num_images))

    @cached_property
    def source(self) -> Path | None:
        """--source, else unpacked CIFAKE, else None for the generated sample."""
        archive = Path(os.environ.get("CIFAKE_TEST_DATA", "")) / "cifake.tar.xz"
        if self.options.source is None and archive.is_file():
            return unpack_cifake(archive, self.work / "cifake")
        return self.options.source and self.options.source.resolve()

    @cached_property
    def bundle(self) -> Path:
        """The built-in detector, else one with random weights, which costs the same."""
        from cifake_ray.storage.bundles.bundle import locate_bundle, write_bundle

        boxed = locate_bundle(None)
        if (boxed / "config.json").exists():
            return boxed
        from cifake_ray.core.evaluation.calibration import Calibration
        from cifake_ray.core.models.detector import build_detector

        calibration = Calibration(
            temperature=1.0, threshold=0.5, threshold_fpr_1=0.9, threshold_fpr_01=0.99
        )
        nothing: Any = {"training": {}, "metrics": {}, "history": [], "model_card": "random\n"}
        write_bundle(self.work / "bundle", build_detector("cnn"), calibration, **nothing)
        return self.work / "bundle"

    def compare(self, title: str, contenders: list[Contender]) -> None:
        contenders = [
            c for c in contenders if not self.options.bare_only or "Ray Data" not in c.name
        ]
        results: dict[str, list[Result]] = {contender.name: [] for contender in contenders}
        for repeat in range(self.options.repeats):
            for contender in contenders:
                print(f"{title}: {contender.name}, repeat {repeat + 1}", file=sys.stderr)
                out = self.work / "out"
                results[contender.name].append(run_command(contender.make_command(out), out))
        self.results[title] = results
        num_images = results[contenders[0].name][0].images
        print(f"\n### {title}: {num_images:,} images, {self.options.repeats} repeats\n")
        print("| | images/s from process start | to bare | steady images/s | to bare |")
        print("|---|---:|---:|---:|---:|")
        for contender in contenders:
            mine, bare = results[contender.name], results.get(contender.bare, [])
            cells = [format_rates(mine, bare, n) for n in ("images_per_s", "steady_images_per_s")]
            print(f"| {contender.name} | {' | '.join(cells)} |")
        sys.stdout.flush()

    def convert(self) -> None:
        source = self.images(self.options.images)
        contenders = [
            Contender("cifake-ray convert", run_ours("convert", str(source), "{out}")),
            Contender("bare loop", run_peer("convert_bare.py", source)),
            Contender("Ray Data, read_images", run_peer("convert_ray.py", source, "images")),
            Contender("Ray Data, read_binary_files", run_peer("convert_ray.py", source, "binary")),
        ]
        self.compare("convert", contenders)

    def score(self) -> None:
        source, bundle = self.images(self.options.images), str(self.bundle)
        ours = run_ours("score", str(source), "{out}", "--bundle", bundle)
        contenders = [
            Contender("cifake-ray score", ours),
            Contender("bare loop", run_peer("score_bare.py", source, bundle)),
            Contender("Ray Data, read_images", run_peer("score_ray.py", source, bundle)),
            Contender("torch DataLoader", run_peer("score_loader.py", source, bundle)),
        ]
        self.compare("score", contenders)

    def train(self) -> None:
        source = self.images(self.options.images)
        shards, cache = self.work / "shards", str(self.work / "cache")
        if not shards.exists():
            kept = self.work / "nothing"  # run_command removes its second argument
            run_command(run_ours("convert", str(source), "{out}")(shards), kept)
        contenders = []
        for n in (1, 2):
            fixed = ("--epochs", EPOCHS, "--num-workers", str(n), "--cache-dir", cache)
            ours = run_ours("train", str(shards), "{out}", *fixed)
            processes = "1 process" if n == 1 else f"{n} processes"
            bare = f"bare, {processes}"
            contenders += [
                Contender(f"cifake-ray train --num-workers {n}", ours, bare),
                Contender(bare, run_peer("train_bare.py", shards, cache, EPOCHS, str(n)), bare),
            ]
            for layout in ("default", "channels-last"):
                timm = ("train_timm.py", source, EPOCHS, str(n), *share_cores(n), layout)
                contenders.append(
                    Contender(f"timm's loop, {processes}, {layout}", run_peer(*timm), bare)
                )
        self.compare("train", contenders)

    def memory(self) -> None:
        print(
            f"\n### memory: peak of the driver, at most {MEMORY_LIMIT_MB} MB more for more images\n"
        )
        sizes = (MEMORY_IMAGES, self.options.large)
        print(f"| | MB at {sizes[0]:,} images | MB at {sizes[1]:,} | more | |")
        print("|---|---:|---:|---:|---|")
        for verb in ("convert", "score"):
            extra = ("--bundle", str(self.bundle)) if verb == "score" else ()
            peaks: list[float] = []
            for size in sizes:
                command = run_ours(verb, str(self.images(size)), "{out}", *extra)
                out = self.work / "out"
                print(f"memory: {verb}, {size:,} images", file=sys.stderr)
                runs = [run_command(command(out), out) for _ in range(self.options.repeats)]
                self.results.setdefault("memory", {})[f"{verb} {size}"] = runs
                peaks.append(median(run.peak_mb for run in runs))
            more = peaks[1] - peaks[0]
            verdict = "ok" if more < MEMORY_LIMIT_MB else "TOO MUCH"
            print(f"| {verb} | {peaks[0]:,.0f} | {peaks[1]:,.0f} | {more:+,.1f} | {verdict} |")
        sys.stdout.flush()

    def sample(self) -> None:
        ours = run_ours("sample", "{out}", "--images", str(self.options.images))
        self.compare("sample", [Contender("cifake-ray sample", ours)])


def format_rates(mine: list[Result], bare: list[Result], name: str) -> str:
    """Return two cells: median rate, and median ratio to the bare loop of the same repeat."""
    rates, others = [getattr(r, name) for r in mine], [getattr(r, name) for r in bare]
    if None in rates:
        return "- | -"
    ratio = f"{median(a / b for a, b in zip(rates, others, strict=True)):.2f}" if others else "-"
    return f"{median(rates):,.0f} | {ratio}"


def describe_machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    packages = ("cifake-ray", "ray", "torch", "timm", "pyarrow", "pillow")
    return {
        "cores": str(NUM_CORES),
        "cpu": models[0] if models else platform.machine(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    benches = ("convert", "score", "train", "memory", "sample")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bench", nargs="*", help=f"which of {', '.join(benches)} (default: all)")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--large", type=int, default=110_000, help="images in the memory benchmark")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare-only", action="store_true", help="omit plain Ray Data")
    parser.add_argument("--source", type=Path, help="image folder (default: CIFAKE or the sample)")
    parser.add_argument("--workdir", type=Path, help="parent of the temporary folder")
    parser.add_argument("--json", type=Path, help="file for all single results")
    options = parser.parse_args()
    if unknown := set(options.bench) - set(benches):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    machine = describe_machine()
    print(f"`{shlex.join(['python', 'tests/benchmarks/run.py', *sys.argv[1:]])}`\n")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    with tempfile.TemporaryDirectory(prefix="cifake-bench-", dir=options.workdir) as work:
        bench = Bench(options, Path(work))
        for name in options.bench or benches:
            getattr(bench, name)()
        print(f"\nimages: {bench.source.name if bench.source else 'the sample'}")
    if options.json:
        results = {
            title: {name: [asdict(run) for run in runs] for name, runs in rows.items()}
            for title, rows in bench.results.items()
        }
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
