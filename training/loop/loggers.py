"""Where metrics go besides ``metrics.jsonl``: TensorBoard and Weights & Biases, each an optional extra.

A logger changes no result. One that cannot be started stops the command before training; one that fails later is
warned of once and left out, and training goes on. Every number is logged at its training step, and a run that is
resumed logs no step twice: what an earlier process sent after the checkpoint is hidden (TensorBoard) or not sent again
(W&B), and would be the same numbers anyway.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tailrace.storage.errors import SettingsError
from tailrace.storage.parsing import parse_json

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
WANDB = "wandb"
RUNS = "runs"
"""A sweep's folder of runs, which W&B shows as a group."""
_WANDB_STATE = "run.json"

FIRST = {
    ("train", "loss"): "loss",
    ("train", "lr"): "lr",
    ("heldout", "fvu"): "fvu",
    ("heldout", "l0"): "l0",
    ("heldout", "dead_fraction"): "dead",
}
"""What is looked at first, without a group."""
GROUPS = {"heldout": "scores", "features": "sparsity"}
"""A line's group where it is not its split. Tools sort by name: what has no group comes before all groups."""
ONLY_REFERENCE = {
    "losses/l1_loss": "train/l1",
    "metrics/explained_variance": "train/explained_variance",
    "metrics/explained_variance_std": "train/explained_variance_std",
    "metrics/n_resampled_neurons": "train/resampled_features",
    "metrics/mean_log10_feature_sparsity": "sparsity/mean_log10_frequency",
    "plots/feature_density_line_chart": "sparsity/log10_frequency",
    "sparsity/mean_passes_since_fired": "sparsity/mean_steps_since_fired",
    "sparsity/below_1e-5": "sparsity/below_1e-5",
    "sparsity/below_1e-6": "sparsity/below_1e-6",
    "sparsity/dead_features": "sparsity/rare",
}
"""Clean names of what only the original code's names stand for; its other names repeat our own."""

WandbMode = Literal["auto", "online", "offline"]


def tag(split: str, name: str) -> str | None:
    """Return what loggers call a number of a line in ``metrics.jsonl``; None for one that repeats another."""
    if "/" in name:
        return ONLY_REFERENCE.get(name)
    return FIRST.get((split, name), f"{GROUPS.get(split, split)}/{name}")


class Logger(Protocol):
    """Receives the metrics of one run."""

    name: str
    """What the user calls it."""

    def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
        """Get ready to log steps after ``first_step`` of the run in ``directory``; ``config``: its settings as JSON.

        Raises SettingsError if it cannot.
        """
        ...

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers at ``step``; steps never fall."""
        ...

    def log_histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Log ``counts`` in the bins between ``edges``, one more than there are counts."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


class TensorBoardLogger:
    """Event files in ``tensorboard/`` of the run's directory, by the run's name. Needs ``tailrace[tensorboard]``."""

    name = "TensorBoard"

    def __init__(self, *, reference_names: bool = False) -> None:
        self.reference_names = reference_names
        self._writer: Any = None

    def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
        """Open a new event file; what older ones hold after ``first_step`` is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SettingsError(
                f"TensorBoard cannot be used, because a package is missing ({error}): "
                "pip install 'tailrace[tensorboard]', or leave TensorBoard out"
            ) from error
        self._writer = SummaryWriter(str(directory / TENSORBOARD / run_name), purge_step=first_step + 1)
        self._writer.add_text("settings", f"```\n{json.dumps(config, indent=2)}\n```", first_step + 1)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Write the bins; sums are those of the bins' middles."""
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
        squares = sum(count * middle**2 for count, middle in zip(counts, middles, strict=True))
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=total,
            sum_squares=squares,
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandbLogger:
    """A Weights & Biases run with files in ``wandb/`` of the run's directory. Needs the extra ``tailrace[wandb]``.

    ``auto`` goes offline where no key is found or the server does not answer; ``wandb sync`` sends such a run later.
    WANDB_MODE, where set, is obeyed instead.
    """

    name = "W&B"

    def __init__(
        self,
        project: str = "tailrace",
        *,
        mode: WandbMode = "auto",
        start_timeout: float = 20.0,
        reference_names: bool = False,
    ) -> None:
        self.reference_names = reference_names
        self._project, self._mode, self._timeout = project, mode, start_timeout
        self._run: Any = None
        self._last_step = 0
        self._state = Path()
        self._reason = "asked for"

    def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
        """Begin a run, or continue the one begun in ``directory`` if training continues too."""
        try:
            import wandb
        except ImportError as error:
            raise SettingsError(
                f"W&B cannot be used, because a package is missing ({error}): "
                "pip install 'tailrace[wandb]', or leave W&B out"
            ) from error
        folder = directory / WANDB
        folder.mkdir(exist_ok=True)
        self._state = folder / _WANDB_STATE
        run_id, self._last_step = self._earlier(first_step)
        arguments: dict[str, Any] = {
            "project": self._project,
            "name": run_name,
            "id": run_id,
            "resume": "allow",
            "reinit": "create_new",  # runs side by side have one each; otherwise all would get the first one's
            "dir": str(directory),
            "config": dict(config),
        }
        if directory.parent.name == RUNS:
            arguments["group"] = directory.parent.parent.name
        quiet = {"init_timeout": self._timeout, "silent": True, "console": "off"}
        mode = self._choose_mode(wandb)
        try:
            self._run = wandb.init(mode=mode, settings=wandb.Settings(**quiet), **arguments)
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            if self._mode != "auto" or mode == "offline":
                raise SettingsError(
                    f"W&B did not start ({error}): check the key (wandb login) and the network, "
                    "or choose the mode offline"
                ) from error
            self._reason = str(error)
            run_id = _new_run_id()  # W&B's service still holds the one that failed
            arguments |= {"mode": "offline", "id": run_id}
            self._run = wandb.init(settings=wandb.Settings(**quiet), **arguments)
        self._remember(run_id)
        if getattr(self._run, "offline", False):
            folder = Path(self._run.dir).parent
            logger.warning("W&B is offline (%s); to send the run later: wandb sync %s", self._reason, folder)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers unless this step was sent before training was interrupted."""
        self._log(step, dict(values))

    def log_histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Send the bins unless this step was sent before."""
        import wandb

        self._log(step, {name: wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))})

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step <= self._last_step:
            return
        self._run.log(values, step=step)
        self._remember(self._run.id, step - 1)

    def _earlier(self, first_step: int) -> tuple[str, int]:
        """Return the run's id and the last step it has; a run that starts from nothing is a new one."""
        if first_step > 0 and self._state.exists():
            state = parse_json(self._state.read_text())
            return state["id"], state["last_step"]
        return _new_run_id(), 0

    def _remember(self, run_id: str, last_step: int | None = None) -> None:
        # the latest step may get more values, so it only counts as sent once a later one is
        state = {"id": run_id, "last_step": self._last_step if last_step is None else max(self._last_step, last_step)}
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.rename(self._state)

    def _choose_mode(self, wandb: Any) -> Any:
        if asked := os.environ.get("WANDB_MODE"):
            return asked
        if self._mode != "auto":
            return self._mode
        if wandb.run is not None:  # the caller's own, beside which login answers no, whatever there is
            return "offline" if wandb.run.offline else "online"
        wandb.setup(wandb.Settings(silent=True))
        try:
            # asks the server too: a run that fails to start there would leave its id in use
            if wandb.login(prompt=False, verify=True):
                return "online"
        except wandb.errors.AuthenticationError as error:
            self._reason = str(error)
            return "offline"
        self._reason = "no key found"
        return "offline"


def _new_run_id() -> str:
    return uuid.uuid4().hex[:8]


class Loggers:
    """The loggers of one run, none of which can stop it once it is under way."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._active = list(loggers)

    def start(self, directory: Path, run_name: str, config: Mapping[str, Any], first_step: int) -> None:
        """Start all of them. Raises SettingsError with what is wrong with each that cannot be."""
        problems = []
        try:
            for active in self._active:
                try:
                    active.start(directory, run_name, config, first_step)
                except SettingsError as error:
                    problems.append(str(error))
            if problems:
                raise SettingsError("\n".join(problems))
        except BaseException:  # a disk that refuses, Ctrl-C: those that started are not left open
            self.close()
            raise

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log the numbers among ``values``."""
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        for active in list(self._active):
            self._guarded(active, partial(active.log_scalars, step, numbers))

    def log_histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Log one histogram."""
        for active in list(self._active):
            self._guarded(active, partial(active.log_histogram, step, name, counts, edges))

    def close(self) -> None:
        """Close all of them."""
        for active in list(self._active):
            self._guarded(active, active.close)
        self._active = []

    def _guarded(self, failing: Logger, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever goes wrong in a logger must not cost the training run
            self._active.remove(failing)
            logger.warning(
                "%s failed (%s) and is left out from here on; metrics.jsonl has every number", failing.name, error
            )


def build_loggers(
    *,
    tensorboard: bool = False,
    wandb_project: str | None = None,
    wandb_mode: WandbMode = "auto",
    reference_names: bool = False,
) -> list[Logger]:
    """Return new loggers for one run: those asked for; with ``reference_names`` they get the original code's too."""
    chosen: list[Logger] = []
    if tensorboard:
        chosen.append(TensorBoardLogger(reference_names=reference_names))
    if wandb_project is not None:
        chosen.append(WandbLogger(wandb_project, mode=wandb_mode, reference_names=reference_names))
    return chosen
