"""Open a checkpoint through TransformerLens: from the hub or a folder, in a chosen dtype, quietly.

TransformerLens and transformers set log levels, draw progress bars and warn as they are imported and as they load;
all of it is contained here, so that importing this module changes nothing and loading prints nothing.

Code that a checkpoint brings along is never run, and never asked about. Where transformers is not given an answer, it
asks on standard input whether to run the code, and whatever lies there answers. TransformerLens runs the modelling file
of some architectures by the architecture's name alone, and asks nobody; for some that read images it has pip install
torchvision, which no stage needs.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import platform
import struct
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch

from tailrace.pipeline.model.locations import WEIGHT_FILES, named_folder
from tailrace.pipeline.shared.compute import device_named
from tailrace.storage.errors import ModelError, OutOfMemoryError
from tailrace.storage.names import home_path
from tailrace.storage.parsing import parse_json, shown

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json", "*.bpe")
_NOISY_LOGGERS = ("transformers", "huggingface_hub", "transformer_lens")
_OTHER_KINDS = {
    "seq2seq": "an encoder with a decoder",
    "masked_lm": "which fills in masked tokens and sees those after them",
    "audio": "which reads audio",
    "vision": "which reads images",
}
_WRITTEN_OUT = ("fp8", "mxfp4")
"""Quantisations that transformers turns into ordinary weights while it loads, on any device."""
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(NamedTuple):
    """A checkpoint whose configuration is known and whose weights are not yet read."""

    name: str
    """A folder, or a name on the hub."""
    is_local: bool
    commit: str | None
    """The hub's commit hash; None for a folder."""
    config: Any

    @property
    def revision(self) -> str | None:
        """What to ask the hub for, so that every file comes from one commit."""
        return self.commit


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep third-party warnings, progress bars and log lines below errors from the user, for this block only."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [(logger, logger.level) for logger in loggers]
    # TransformerLens also logs on the root logger. A filter there stops those lines only; a level would stop ours.
    root = logging.getLogger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as transformers_logging

        had_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        root.addFilter(_is_error)
        try:
            yield
        finally:
            root.removeFilter(_is_error)
            for logger, level in levels:
                logger.setLevel(level)
            if had_bars:
                transformers_logging.enable_progress_bar()


def open_checkpoint(name: str, revision: str | None) -> Checkpoint:
    """Read a checkpoint's configuration, and resolve ``revision`` to a commit hash if it is on the hub.

    Raises ModelError if there is none, with near matches for a folder and the way round a missing network.
    """
    name = named_folder(name)
    folder = home_path(name)
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"model {name}: is a folder and has no revisions; leave out --revision {revision}")
        _check_folder(folder)
        return Checkpoint(str(folder), True, None, _read_config(str(folder), None))
    if _looks_like_path(name):
        raise ModelError(_no_such_folder(folder))
    config = _read_config(name, revision)
    return Checkpoint(name, False, _commit_hash(name, revision), config)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Tell whether a tokenizer lies beside a checkpoint in a folder; every checkpoint of the hub is taken to have one.

    Without it transformers would make up a tokenizer that knows no word.
    """
    files = list(Path(checkpoint.name).iterdir()) if checkpoint.is_local else []
    return not checkpoint.is_local or any(path.match(pattern) for path in files for pattern in TOKENIZER_FILES)


def check_kind(checkpoint: Checkpoint) -> None:
    """Raise ModelError, before anything is read, for a checkpoint whose configuration says that it cannot be used.

    Used are language models that predict each token from those before it, with weights that are numbers: quantised
    ones are used only where transformers writes them out as it loads.
    """
    from transformer_lens.utilities.architectures import AUDIO_TEXT_ARCHITECTURES, classify_model_config

    named = getattr(checkpoint.config, "architectures", None) or [type(checkpoint.config).__name__]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(f"model {checkpoint.name}: its config.json has {shown(named)} for architectures, wanted names")
    kind = "audio" if AUDIO_TEXT_ARCHITECTURES.intersection(named) else classify_model_config(checkpoint.config)
    if kind in _OTHER_KINDS:
        raise ModelError(
            f"model {checkpoint.name}: is {named[0]}, {_OTHER_KINDS[kind]}; only language models that predict each "
            "token from those before it are supported, so choose one of these"
        )
    _check_architecture(checkpoint)
    quantised = _quantisation(checkpoint)
    method = str(quantised.get("quant_method", "unnamed method")).removeprefix("QuantizationMethod.")
    if quantised and method not in _WRITTEN_OUT:
        bits = next(
            (f", {n}-bit" for n in (4, 8) if quantised.get(f"load_in_{n}bit") or quantised.get("bits") == n), ""
        )
        raise ModelError(
            f"model {checkpoint.name}: its weights are quantised ({method}{bits}), and only "
            f"{' and '.join(_WRITTEN_OUT)} are written out as numbers while loading; use the checkpoint that it was "
            "quantised from, or write this one out where it can be loaded: model.dequantize().save_pretrained(FOLDER)"
        )


def _check_architecture(checkpoint: Checkpoint) -> None:
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    try:
        determine_architecture_from_hf_config(checkpoint.config)
    except ValueError:  # its text names all 160 that there are
        _refuse_own_model_class(checkpoint)
        named = getattr(checkpoint.config, "architectures", None) or [type(checkpoint.config).__name__]
        raise ModelError(
            f"model {checkpoint.name}: is {named[0]}, which TransformerLens {version('transformer_lens')} does not "
            "support; use a model of an architecture that the documentation's page Families lists, or a newer "
            "TransformerLens if that has it"
        ) from None


def _quantisation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what config.json says about quantisation; empty for plain weights."""
    written = getattr(checkpoint.config, "quantization_config", None)
    return dict(written) if isinstance(written, Mapping) else (written.to_dict() if written is not None else {})


def choose_dtype(checkpoint: Checkpoint, wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in; ``auto`` is the checkpoint's own, except float16 on a CPU.

    CPUs have no float16 arithmetic: torch emulates it, several times slower than float32, which holds the same
    weights exactly.
    """
    dtype = _checkpoint_dtype(checkpoint) if wanted == "auto" else getattr(torch, wanted)
    assert isinstance(dtype, torch.dtype)
    if device.type != "cpu":
        if dtype is torch.float32 and wanted == "auto":
            logger.warning(
                "%s: its weights are float32, and so it is computed; --model-dtype bfloat16 is several times faster on "
                "a GPU, and rounds activations to 3 digits",
                checkpoint.name,
            )
        return dtype
    if dtype is torch.float16 and wanted != "auto":
        logger.warning("CPUs have no float16 arithmetic: it is emulated, several times slower than float32")
    if dtype is torch.bfloat16 and _emulates_bfloat16():
        logger.warning(
            "this CPU has no bfloat16 arithmetic and emulates it, 2 to 4 times slower than float32; "
            "--model-dtype float32 computes with the same weights and rounds less"
        )
    return torch.float32 if dtype is torch.float16 and wanted == "auto" else dtype


def boot(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, processing: str, tokenizer: Any = None
) -> Any:
    """Load the weights and return a ``TransformerBridge`` in evaluation mode, without gradients.

    ``processing`` is ``raw`` or ``compatibility`` (norms folded into weights, as ``HookedTransformer`` did).
    ``tokenizer`` stands in for that of a checkpoint which has none; it may be changed.
    """
    with quiet(), own_code_refused(checkpoint.name):
        bridge = _boot(checkpoint, dtype, device, tokenizer)
        if processing == "compatibility":
            _enable_compatibility(bridge, checkpoint.name)
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


def _boot(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    quantised = _quantisation(checkpoint)
    quantised.update({"dequantize": True} if quantised else {})  # the same numbers on every device, and readable ones
    try:
        return TransformerBridge.boot_transformers(
            checkpoint.name,
            device=str(device),
            dtype=dtype,
            tokenizer=tokenizer,
            revision=checkpoint.revision,
            trust_remote_code=False,
            # TransformerLens does not pass that on to the model's class, which would ask for the classes named here
            hf_config_overrides={"auto_map": {}, **({"quantization_config": quantised} if quantised else {})},
        )
    except (UnpicklingError, EOFError) as error:
        raise ModelError(
            f"model {checkpoint.name}: its weights are damaged, or a pickle that holds more than tensors and could run "
            "code when it is opened, which is never done; get the checkpoint again, or one with model.safetensors "
            "(where the model was made, model.save_pretrained(FOLDER) writes it)"
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(
            f"model {checkpoint.name}: does not fit into the memory of {device}; use --model-dtype bfloat16, or "
            "another --device"
        ) from error
    except Exception as error:  # the readers and the classes raise whatever the files lead them to
        _refuse_own_model_class(checkpoint)
        raise ModelError(
            f"model {checkpoint.name}: cannot be loaded: {_first_line(error).rstrip('.')} (`pipeline --debug …` shows "
            "where)"
        ) from error


def _refuse_own_model_class(checkpoint: Checkpoint) -> None:
    """Raise ModelError if transformers knows the configuration's type but only the checkpoint has a model of it."""
    from transformers import AutoModelForCausalLM

    if type(checkpoint.config) not in AutoModelForCausalLM._model_mapping:
        auto_map = getattr(checkpoint.config, "auto_map", None)
        refuse_own_class(checkpoint.name, "config.json", auto_map, "AutoModelForCausalLM")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def compile_mlps(bridge: Any) -> None:
    """Compile every MLP with ``torch.compile``; the first batch then takes some seconds longer.

    Only MLPs, from input to output: the hooks between a block's parts would break a larger graph apart.
    """
    for block in bridge.blocks:
        mlp = getattr(getattr(block, "mlp", None), "original_component", None)
        if mlp is not None:
            mlp.compile()


def parse_device(device: str) -> torch.device:
    """Return the device named, ``auto`` being a GPU if there is one; raise ModelError if this machine has no such."""
    try:
        parsed = torch.device(device_named(device))
    except RuntimeError as error:
        raise ModelError(f"device {device!r}: is none; write cpu, cuda or cuda:1") from error
    n_gpus = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= n_gpus:
        raise ModelError(f"device {device!r}: torch sees {n_gpus} CUDA devices here; use --device cpu, or install CUDA")
    return parsed


def _emulates_bfloat16() -> bool:
    """Tell whether this is an x86 CPU without bfloat16 instructions; measured there on SmolLM2: 3.5 times slower."""
    return platform.machine() in ("x86_64", "AMD64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _enable_compatibility(bridge: Any, name: str) -> None:
    try:
        bridge.enable_compatibility_mode(disable_warnings=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"model {name}: TransformerLens cannot process this architecture's weights: {_first_line(error)}; "
            "use --processing raw"
        ) from error


def _read_config(name: str, revision: str | None) -> Any:
    with quiet():
        from transformers import CONFIG_MAPPING, AutoConfig

        try:
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except Exception as error:  # of a broken file, its reader raises whatever it leads it to
            written = read_checkpoint_json(name, "config.json", revision)
            if written.get("model_type") not in CONFIG_MAPPING:
                refuse_own_class(name, "config.json", written.get("auto_map"), "AutoConfig")
            at = f" at revision {revision}" if revision else ""
            advice = "" if Path(name).is_dir() else _hub_advice(name)
            raise ModelError(f"model {name}{at}: cannot be opened: {_first_line(error)}{advice}") from error


def _hub_advice(name: str) -> str:
    """Return what to do about a hub name that cannot be opened, with the nearest names that can be meant."""
    from transformer_lens.supported_models import MODEL_ALIASES

    official = next((hub for hub, aliases in MODEL_ALIASES.items() if name in aliases), None)
    meant = f"\n  TransformerLens once called a model that; its name on the hub is {official}." if official else ""
    beside = _near_folders(Path(name))
    folders = f"\n  Folders here with a similar name: {', '.join(beside)}." if beside else ""
    return (
        f"{meant}{folders}\n  Check the name. On a machine without network, download the model elsewhere "
        f"(hf download {name} --local-dir FOLDER), copy the folder here and pass --model FOLDER."
    )


def _check_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    missing = [] if "config.json" in names else ["config.json"]
    if not names.intersection(WEIGHT_FILES):
        missing.append("weights (model.safetensors, or model.safetensors.index.json with its shards)")
    if missing:
        raise ModelError(
            f"model {folder}: is not a model in Hugging Face format, it has no {' and no '.join(missing)}; "
            f"found: {', '.join(sorted(names)[:8]) or 'nothing'}"
        )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or name == ""


def _no_such_folder(folder: Path) -> str:
    parent = next((path for path in folder.parents if path.is_dir()), Path())
    near = _near_folders(folder)
    return f"model {folder}: no such folder; " + (
        f"near matches: {', '.join(near)}" if near else f"{parent} exists and has no folder of a similar name"
    )


def _near_folders(folder: Path) -> list[str]:
    if not folder.parent.is_dir():
        return []
    names = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    return [str(folder.parent / name) for name in difflib.get_close_matches(folder.name, names, n=3, cutoff=0.6)]


def _commit_hash(name: str, revision: str | None) -> str | None:
    """Return the commit that the configuration just read came from: its file lies in ``snapshots/<commit>/``."""
    path = _cached_file(name, "config.json", revision)
    return path.parent.name if path is not None else None


def _cached_file(name: str, file: str, revision: str | None) -> Path | None:
    path = None
    with quiet(), contextlib.suppress(OSError):  # of what can be no name on the hub
        from transformers.utils.hub import cached_file

        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if path is None else Path(path)


def read_checkpoint_json(name: str, file: str, revision: str | None) -> dict[str, Any]:
    """Return the mapping in a JSON file of a checkpoint; empty if there is none."""
    path = _cached_file(name, file, revision)
    try:
        content = {} if path is None else parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    own = getattr(checkpoint.config.get_text_config(), "dtype", None) or getattr(checkpoint.config, "dtype", None)
    if isinstance(own, str):
        own = getattr(torch, own.removeprefix("torch."), None)
    if isinstance(own, torch.dtype) and own.is_floating_point:
        return own
    return _weights_dtype(checkpoint) or torch.float32


def _weights_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Return the dtype of the first floating-point weight on disk; older configurations do not say."""
    path = _cached_file(checkpoint.name, "model.safetensors", checkpoint.revision)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(size))
    except (struct.error, ValueError, MemoryError):  # damaged: what reads the weights says so
        return None
    kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
    return next((_SAFETENSORS_DTYPES[kind] for kind in kinds if kind in _SAFETENSORS_DTYPES), None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def own_code_refused(name: str) -> Iterator[None]:
    """Raise ModelError at the end if a checkpoint's own code was wanted inside, where none of it is run.

    Every file of such code comes through one function of transformers. TransformerLens takes its failure for code that
    is not there and goes on with another class, hence the error at the end.
    """
    from transformer_lens.model_bridge.sources.transformers import helpers as installer
    from transformers import dynamic_module_utils as door

    wanted: list[str] = []

    def refuse(_: Any, file: str, *__: Any, **___: Any) -> None:
        wanted.append(file)
        raise ValueError(f"{file} is not run")

    opened, door.get_cached_module_file = door.get_cached_module_file, refuse
    install, installer._ensure_torchvision = installer._ensure_torchvision, lambda: False
    try:
        yield
    finally:
        door.get_cached_module_file = opened
        installer._ensure_torchvision = install
        if wanted:
            raise ModelError(_refusal(name, f"its architecture is loaded with {wanted[0]}"))


def refuse_own_class(name: str, file: str, auto_map: Any, kind: str) -> None:
    """Raise ModelError if ``file`` of a checkpoint names a class of its own for ``kind``, such as ``AutoConfig``."""
    classes = auto_map.get(kind) if isinstance(auto_map, Mapping) else auto_map
    named = [one for one in (classes if isinstance(classes, list) else [classes]) if isinstance(one, str)]
    if named:
        module, _, own = named[0].rpartition("--")[2].rpartition(".")
        raise ModelError(_refusal(name, f"its {file} asks for the class {own} of {module}.py"))


def _refusal(name: str, asked: str) -> str:
    from transformers import __version__

    return (
        f"model {name}: {asked}, and transformers {__version__} has no class of its own for it; code from a model's "
        "folder is never run. Use a checkpoint converted to a format that transformers knows, or a newer transformers "
        "if that knows this one"
    )
