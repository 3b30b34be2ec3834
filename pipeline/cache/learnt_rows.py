"""Which tokens transcoders have learnt: those that became rows of the contexts they were trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.text.settings import RowFilter
from tailrace.training.architectures.manifest import AnyTranscoderManifest

logger = logging.getLogger(__name__)


class LearntContexts(NamedTuple):
    """The contexts that a transcoder was trained on, and which of their tokens were rows."""

    rows: RowFilter
    context_length: int

    @classmethod
    def of(cls, manifest: AnyTranscoderManifest) -> Self | None:
        """Return what a transcoder's manifest records; None of an import, or where an older version kept nothing."""
        live = (manifest.inputs.live or {}).get("packing")
        packing = live or manifest.packing
        if not packing:
            return None
        rows = live or packing["row_filter"]
        known = {name: rows[name] for name in RowFilter.model_fields if name in rows}
        return cls(RowFilter.model_validate(known), packing["context_length"])

    def mask(self, tokens: Tensor, model: LanguageModel) -> Tensor:
        """Return which of ``tokens`` (contexts, positions), bool, would be rows if every role gave some."""
        keeps = self.rows.model_copy(update={"roles": None}).row_mask(self.context_length, model.special_token_ids)
        return torch.from_numpy(keeps(tokens.cpu().numpy()))

    def __str__(self) -> str:
        left_out = {"bos": "the BOS", "special": "special tokens", "none": "no token"}[self.rows.exclude]
        first = f", positions before {self.rows.first_position}" if self.rows.first_position else ""
        roles = f", all but messages of {self.rows.roles}" if self.rows.roles else ""
        return f"{left_out}{first}{roles}"


class LearntTokens:
    """Tells at which tokens every one of some layers has learnt.

    A transcoder that does not record its rows counts as having learnt all but the first position. Warns, once, of such
    transcoders, of others that have not learnt from the same tokens, and of contexts longer than they ever saw.
    """

    def __init__(self, layers: Sequence[TranscoderLayer], model: LanguageModel) -> None:
        learnt = {str(layer.path): LearntContexts.of(layer.manifest) for layer in layers}
        self._known = {path: one for path, one in learnt.items() if one is not None}
        self._unknown = [path for path, one in learnt.items() if one is None]
        self._model, self._has_warned = model, False
        if self._unknown:
            logger.warning(
                "%s: which tokens %s learnt from is not recorded (an import, or an older version's): taken for all but "
                "the BOS",
                *(_named(self._unknown), "they" if len(self._unknown) > 1 else "it"),
            )
        if by_role := [path for path, one in self._known.items() if one.rows.roles]:
            logger.warning(
                "%s learnt from messages of some roles only, and tokens do not say by which role they are: %s taken "
                "for all roles, but for those that a cache leaves out",
                *(_named(by_role), "they are" if len(by_role) > 1 else "it is"),
            )
        left_out = {str(one): path for path, one in self._known.items()}
        if len(left_out) > 1:
            logger.warning(
                "transcoders that learnt from different tokens: %s; they are used where all have learnt",
                "; ".join(f"{path} without {rows}" for rows, path in left_out.items()),
            )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return which of ``tokens`` (contexts, positions), bool on the CPU, all have learnt from."""
        n_positions = tokens.shape[1]
        longest = min((one.context_length for one in self._known.values()), default=n_positions)
        if n_positions > longest and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a context of %d tokens: %s learnt from contexts of %d, so positions from %d on are new there",
                *(n_positions, _named(list(self._known)), longest, longest),
            )
        masks = [one.mask(tokens, self._model) for one in set(self._known.values())]
        if self._unknown or not masks:
            masks.append((torch.arange(n_positions) > 0).expand(tuple(tokens.shape)))
        return torch.stack(masks).all(0)


def _named(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + more
