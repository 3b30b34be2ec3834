"""From text to trained transcoders through an on-disk activation cache.

The code lies in four folders at the top of the repository: ``pipeline``, ``analysis``, ``training`` and ``storage``.
Installed, they are subpackages of this one; in a checkout, this folder holds a link to each.
"""

from importlib.util import find_spec

if find_spec("tailrace.storage") is None:
    raise ImportError(
        f"{__path__[0]}: holds no storage, pipeline, training and analysis: this copy of the repository lost its "
        "links; clone it with git (core.symlinks=true), or run `pip install -e .` in it"
    )
