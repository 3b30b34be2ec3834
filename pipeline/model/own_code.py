"""Code that a checkpoint brings along: never run, and never asked about.

Where transformers is told nothing, it asks on standard input whether to run the code, and whatever lies there answers.
TransformerLens runs the modelling file of some architectures by the architecture's name alone, and asks nobody; for
some that read images it has pip install torchvision, which no stage needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tailrace.storage.errors import ModelError


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
