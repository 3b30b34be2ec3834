"""The buffer: memory for the stages of the mixing order, filled by one thread while another reads.

Rows are put where they will be served, so a batch is a slice. Three stages lie in a ring: the one being served, and the
two over which the rows of the block being computed are spread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tailrace.pipeline.live.mixing import STAGES_IN_MEMORY, Places
from tailrace.pipeline.live.rows import torch_dtype
from tailrace.storage.cache_format import Site


class StageMemory:
    """Rows of three consecutive stages by ``site/side``, on the CPU in storage dtype."""

    def __init__(self, sites: Sequence[Site], block_rows: int) -> None:
        self._slots: list[dict[str, Tensor]] = [
            {
                f"{site.name}/{side}": torch.empty((block_rows, site.width(side)), dtype=torch_dtype(site))
                for site in sites
                for side in site.sides
            }
            for _ in range(STAGES_IN_MEMORY)
        ]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return sum(rows.nbytes for slot in self._slots for rows in slot.values())

    def put(self, block: int, places: Places, first_row: int, rows: dict[str, Tensor]) -> None:
        """Put consecutive rows of a block, the first of which is its row ``first_row``, where they are served."""
        chosen = slice(first_row, first_row + len(next(iter(rows.values()))))
        is_later, place = torch.from_numpy(places.is_later[chosen]), torch.from_numpy(places.place[chosen])
        for later in (False, True):
            picked = torch.nonzero(is_later if later else ~is_later).flatten()
            slot = self._slots[(block + later) % STAGES_IN_MEMORY]
            for key, values in rows.items():
                slot[key].index_copy_(0, place[picked], values[picked])

    def read(self, stage: int, start: int, stop: int) -> dict[str, Tensor]:
        """Return views of the rows served [start, stop) in a stage; valid until the stage is given back."""
        return {key: rows[start:stop] for key, rows in self._slots[stage % STAGES_IN_MEMORY].items()}
