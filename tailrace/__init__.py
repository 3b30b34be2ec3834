"""From text to trained transcoders through an on-disk activation cache.

``cache``, ``train``, ``sweep``, ``analyze``, ``evaluate``, ``circuit``, ``steer``, ``query``, ``compare``, ``verify``
and ``info`` are the main commands as functions; ``open_cache``, ``load_transcoder``, ``load_transcoders`` and
``open_model`` open what was made; ``replaced`` and ``forward`` run the model with transcoders and edits in place;
``circuits`` takes one prompt apart by hand. Each is loaded when it is first used.

The code lies in four folders at the top of the repository: ``pipeline``, ``analysis``, ``training`` and ``storage``.
Installed, they are subpackages of this one; in a checkout, this folder holds a link to each.
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("tailrace.storage") is None:
    raise ImportError(
        f"{__path__[0]}: holds no storage, pipeline, training and analysis: this copy of the repository lost its "
        "links; clone it with git (core.symlinks=true), or run `pip install -e .` in it"
    )

__version__: str

if TYPE_CHECKING:
    from tailrace import circuits
    from tailrace.analysis.interventions.features import Ablate, Add, Clamp, EditedFeatures, KeepOnly, Scale
    from tailrace.analysis.interventions.forward import forward
    from tailrace.analysis.interventions.metrics import LogitDifference
    from tailrace.analysis.interventions.prompts import pad_prompts
    from tailrace.analysis.splice.replacement import Transcoded, replaced
    from tailrace.pipeline.api import (
        analyze,
        cache,
        circuit,
        compare,
        curves,
        evaluate,
        info,
        query,
        steer,
        sweep,
        train,
        verify,
    )
    from tailrace.pipeline.artifacts.transcoders import load_transcoders
    from tailrace.pipeline.model.of_transcoders import open_model
    from tailrace.storage.activation_cache import open_cache
    from tailrace.storage.errors import ActionableError, ArtifactError, SettingsError
    from tailrace.training.cross_layer.layers import load_transcoder
    from tailrace.training.rows.batches import as_tensor

__all__ = [
    "Ablate",
    "ActionableError",
    "Add",
    "ArtifactError",
    "Clamp",
    "EditedFeatures",
    "KeepOnly",
    "LogitDifference",
    "Scale",
    "SettingsError",
    "Transcoded",
    "analyze",
    "as_tensor",
    "cache",
    "circuit",
    "circuits",
    "compare",
    "curves",
    "evaluate",
    "forward",
    "info",
    "load_transcoder",
    "load_transcoders",
    "open_cache",
    "open_model",
    "pad_prompts",
    "query",
    "replaced",
    "steer",
    "sweep",
    "train",
    "verify",
]

_FEATURES = "tailrace.analysis.interventions.features"
_ELSEWHERE = {
    **dict.fromkeys(("Ablate", "Add", "Clamp", "EditedFeatures", "KeepOnly", "Scale"), _FEATURES),
    **dict.fromkeys(("Transcoded", "replaced"), "tailrace.analysis.splice.replacement"),
    **dict.fromkeys(("ActionableError", "ArtifactError", "SettingsError"), "tailrace.storage.errors"),
    "LogitDifference": "tailrace.analysis.interventions.metrics",
    "as_tensor": "tailrace.training.rows.batches",
    "forward": "tailrace.analysis.interventions.forward",
    "load_transcoder": "tailrace.training.cross_layer.layers",
    "load_transcoders": "tailrace.pipeline.artifacts.transcoders",
    "open_cache": "tailrace.storage.activation_cache",
    "open_model": "tailrace.pipeline.model.of_transcoders",
    "pad_prompts": "tailrace.analysis.interventions.prompts",
}
"""The modules of what does not lie in ``tailrace.pipeline.api``."""


if not TYPE_CHECKING:  # a checker would take any name for one of this module

    def __getattr__(name: str) -> object:
        """Load what is used for the first time: torch and TransformerLens take seconds."""
        if name == "circuits":
            return import_module("tailrace.circuits")
        if name == "__version__":
            return version("tailrace")
        if name not in __all__:
            raise AttributeError(f"module 'tailrace' has no attribute {name!r}; it has {', '.join(__all__)}")
        value: object = getattr(import_module(_ELSEWHERE.get(name, "tailrace.pipeline.api")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
