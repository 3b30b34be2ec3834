"""Claim: a training step takes a fraction of any peer's, at the same width, L0 and batch, on one core.

TopK at least 4 times as fast as SAELens and 2.5 times as fast as sparsify, BatchTopK and JumpReLU 5 times as fast as
SAELens, ReLU + L1 6 times as fast as the original formulation, everything 5 times as fast as dictionary_learning;
each peer in its fastest mode. Contenders are processes that take turns of a step or two.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import Contender, Rates, Work, measure
from benchmarks.peers import environment
from benchmarks.planted_rows import Problem, plant, save
from benchmarks.report import Report, parse_arguments, scratch_folder
from benchmarks.saelens_cache import SAELENS
from benchmarks.step_processes import ContenderFailedError, Side, StepProcess

OURS, REFERENCE = Side("ours", "train_step_ours.py"), Side("reference", "train_step_reference.py")
FLOOR = Side("encoder product alone", "train_step_floor.py")
COUNTED = "auto"
"""The mode of ours that ratios are of: what a user gets. A peer's is its fastest."""
REQUIREMENTS = {
    "SAELens": ("train_step_saelens.py", [SAELENS, "psutil"]),  # as saelens_cache.py has it: one environment for both
    "sparsify": ("train_step_sparsify.py", ["eai-sparsify==1.3.3"]),
    "dictionary_learning": ("train_step_dictionary_learning.py", ["dictionary-learning==0.1.0"]),
}
UNWANTED = {"dictionary_learning": ["torchvision"]}
"""Required by nnsight for image models; the package index's build of it may not load beside a CPU build of torch."""
MODES = {
    "ours": (COUNTED, "dense"),
    "reference": ("float32",),
    "SAELens": ("bfloat16", "bfloat16 compiled"),
    "sparsify": ("float32", "bfloat16"),
    "dictionary_learning": ("float32", "bfloat16"),
}
EXTRA_MODES = {("SAELens", "topk"): ("sparse", "sparse bfloat16")}
QUICK_MODES = {
    "ours": (COUNTED,),
    "reference": ("float32",),
    "SAELens": ("bfloat16",),
    "sparsify": ("float32",),
    "dictionary_learning": ("float32",),
}
OFFERED = {"sparsify": "float32", "dictionary_learning": "float32"}
"""What a side runs on a CPU by itself, where its fastest mode is one it was given here."""
TARGETS: dict[str, dict[str, float | None]] = {
    "topk": {"SAELens": 4, "sparsify": 2.5, "dictionary_learning": 5},
    "batch_topk": {"SAELens": 5, "dictionary_learning": 5},
    "jumprelu": {"SAELens": 5, "dictionary_learning": 5},
    "relu": {"reference": 6, "dictionary_learning": 5, "SAELens": None},
}
"""Architecture → whom it is measured against → how many times as fast it should be (None: no claim)."""


@dataclass(frozen=True)
class Size:
    """A problem and how long it is measured."""

    problem: Problem
    rounds: int
    steps: int
    """Steps of one turn."""
    is_quick: bool = False
    architectures: tuple[str, ...] = ("topk", "batch_topk", "jumprelu", "relu")


QUICK = (Size(Problem(256, 2048, 32), rounds=1, steps=2, is_quick=True),)
FULL = (
    Size(Problem(768, 6144, 64), rounds=4, steps=2),
    Size(Problem(768, 24_576, 64), rounds=3, steps=1, architectures=("topk", "relu")),
)


@dataclass
class Family:
    """What the contenders of one architecture and size did."""

    architecture: str
    size: Size
    processes: list[StepProcess] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Contender → why it could not run."""
    cpu: Rates = field(default_factory=Rates)
    wall: Rates = field(default_factory=Rates)

    def fastest(self, side: str) -> str:
        """Return the name of the fastest of a side's modes. Raises ContenderFailedError if none ran."""
        names = [process.name for process in self.processes if process.side.name == side]
        if not names:
            raise ContenderFailedError(f"no mode of {side} could run {self.architecture}")
        return max(names, key=self.cpu.median)


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    sides = make_sides()
    sizes = QUICK if arguments.quick else FULL
    for size in sizes:
        # a report for each size, so that an interruption loses one at most
        report = start_report(size)
        with scratch_folder(arguments) as folder:
            rows = folder / str(size.problem.d_sae)
            save(plant(size.problem), size.problem, rows)
            for architecture in size.architectures:
                family = measure_family(architecture, size, sides, rows)
                add_rows(report, family)
                add_ratios(report, family)
        report.finish(arguments)
        if missing := [row for row in report.rows if row[2].startswith(OURS.name) and row[3] == "–"]:
            sys.exit("\n".join(f"ours could not run: {' '.join(row)}" for row in missing))


def make_sides() -> dict[str, Side]:
    """Return all sides by name, their environments made."""
    peers = {name: Side(name, script, peer_python(name)) for name, (script, _) in REQUIREMENTS.items()}
    return {side.name: side for side in (OURS, REFERENCE)} | peers


def peer_python(name: str) -> Path:
    """Return the Python of a peer's environment, made at first use."""
    return environment(name.lower(), REQUIREMENTS[name][1], without=UNWANTED.get(name, ()))


def start_report(size: Size) -> Report:
    """Return the report without results."""
    described = (
        f"width {size.problem.width}, d_sae {size.problem.d_sae:,}, L0 {size.problem.l0} ({size.rounds} turns of "
        f"{size.steps} steps each)"
    )
    return Report(
        f"train_step_{size.problem.d_sae}",
        "A training step beside every peer's",
        f"Batch {size.problem.batch_rows:,}; {described}. One core, one thread; each contender is a process, "
        "warmed up by two steps, and they take turns. All train on the same made-up activations: a planted "
        "dictionary with log-normal firing frequencies and 10 % noise, weights starting at the planted ones, ReLU's "
        "bias and JumpReLU's threshold set to the L0 wanted, learning rate 1e-6 so that L0 stays. Processor time of "
        "the process decides (user and system); wall time is beside it. SAELens and dictionary_learning train "
        "autoencoders of the same widths, having no transcoders to train. bfloat16 is autocast; sparsify and "
        "dictionary_learning offer it on a GPU only, and are given it here. sparse is SAELens' TopK with sparse "
        "activations and without rescaling by decoder norms, with which it raises on a CPU. No feature is dead yet, "
        "so no auxiliary loss is at work anywhere. A ratio is over a side's fastest mode; as_offered is over what it "
        "runs on a CPU by itself. Quick runs take one mode of each side.",
        ("d_sae", "architecture", "contender", "CPU ms", "wall ms", "ours is × as fast (range)", "by wall", "L0", "GB"),
        ("torch", "numpy"),
    )


def measure_family(architecture: str, size: Size, sides: dict[str, Side], rows: Path) -> Family:
    """Measure every contender of one architecture and the encoder's product, turn by turn."""
    family = Family(architecture, size)
    with ExitStack() as stack:
        for side, mode in lineup(architecture, sides, is_quick=size.is_quick):
            process = StepProcess(side, architecture, mode, rows)
            try:
                family.processes.append(stack.enter_context(process))
            except ContenderFailedError as error:
                family.failures[process.name] = str(error)
            print(f"{size.problem.d_sae} {architecture}: {process.name} ready", file=sys.stderr, flush=True)
        contenders = [as_contender(process, size, family.wall) for process in family.processes]
        family.cpu = measure(contenders, size.rounds)
    return family


def lineup(architecture: str, sides: dict[str, Side], *, is_quick: bool) -> Iterator[tuple[Side, str]]:
    """Yield every side and mode that trains an architecture, ours first; one mode of each side if quick."""
    for name in (OURS.name, *TARGETS[architecture]):
        modes = QUICK_MODES[name] if is_quick else (*MODES[name], *EXTRA_MODES.get((name, architecture), ()))
        for mode in modes:
            yield sides[name], mode
    for mode in ("float32", "bfloat16"):
        yield FLOOR, mode


def as_contender(process: StepProcess, size: Size, wall: Rates) -> Contender:
    """Return a contender whose seconds are processor time; its wall rates are added to ``wall``."""

    def run() -> Work:
        turn = process.take(size.steps)
        wall.by_name.setdefault(process.name, []).append(size.steps / turn.wall_seconds)
        return Work(size.steps, turn.cpu_seconds)

    return Contender(process.name, run)


def add_rows(report: Report, family: Family) -> None:
    """Add one row per contender, also for those that could not run."""
    first = (f"{family.size.problem.d_sae:,}", family.architecture)
    counted = f"{OURS.name}, {COUNTED}"
    runs = counted in family.cpu.by_name
    for process in family.processes:
        name = process.name
        ratio, by_wall = "", ""
        if runs and name != counted:
            ratio = f"{family.cpu.ratio(counted, name):.3g} ({family.cpu.spread(counted, name)})"
            by_wall = f"{family.wall.ratio(counted, name):.3g}"
        times = [f"{1e3 / rates.median(name):.4g}" for rates in (family.cpu, family.wall)]
        ending = (f"{process.l0:.1f}", f"{process.peak_bytes / 1e9:.2g}")
        report.rows.append((*first, name, *times, ratio, by_wall, *ending))
        versions = ", ".join(f"{package} {version}" for package, version in process.versions.items())
        if process.side.name in REQUIREMENTS:
            report.extra_versions[process.side.name] = versions
    for name, reason in family.failures.items():
        report.rows.append((*first, name, "–", "–", f"did not run: {reason}".replace("|", "/"), "", "", ""))


def add_ratios(report: Report, family: Family) -> None:
    """Add ours over each side's fastest mode, over what it offers, and over the encoder's product."""
    counted = f"{OURS.name}, {COUNTED}"
    if counted not in family.cpu.by_name:
        return
    end = f"_{family.size.problem.d_sae}"
    for side, target in TARGETS[family.architecture].items():
        against = {f"{family.architecture}_vs_{side.lower()}{end}": family.fastest(side)}
        if side in OFFERED:
            against[f"{family.architecture}_vs_{side.lower()}_as_offered{end}"] = f"{side}, {OFFERED[side]}"
        for name, other in against.items():
            report.ratios[name] = family.cpu.ratio(counted, other)
            if target is not None:
                report.targets[name] = f"≥ {target:g}"
    for mode in ("float32", "bfloat16"):
        report.ratios[f"{family.architecture}_over_{mode}_product{end}"] = family.cpu.ratio(
            f"{FLOOR.name}, {mode}", counted
        )


if __name__ == "__main__":
    main()
