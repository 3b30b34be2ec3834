"""Make the released artifacts: ``python -m tests.released.make FOLDER`` at the top of a checkout of that release.

Beside the artifacts, ``values.json`` gets what that release reads in them. This folder is copied into the checkout
first, if the release had none.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.released.runner import finish, make
from tests.released.values import VALUES, is_inside, read_all


def release(folder: Path) -> None:
    """Make every artifact in the new ``folder``, and record what is read in them and in the drafts once finished."""
    make(folder)
    for lock in folder.rglob(".lock"):
        lock.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(shutil.copytree(folder, Path(scratch) / "copied"))
        outputs = finish(copied)
        finished = {name: values for name, values in read_all(copied).items() if is_inside(name, outputs)}
    values = {"published": read_all(folder), "finished": finished}
    (folder / VALUES).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    release(Path(sys.argv[1]).resolve())
