"""How documents become the stream of tokens that is packed: decided once, from settings and first rows, and recorded.

What is not recorded was done as the first release did, so a cache that is extended keeps the way it was begun.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.text.columns import SPECIAL_TOKENS_MASK, BadRow, read_row
from tailrace.pipeline.text.settings import CapturedContexts
from tailrace.pipeline.text.stream import DocumentStream
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError

logger = logging.getLogger(__name__)

_SHOWN = 5


class Reading(NamedTuple):
    """How rows become tokens; the defaults are what the first release did."""

    special_tokens: Literal["text", "markup"] = "markup"
    """What the name of a special token in a text is: letters like any, or that token."""
    token_rows: Literal["documents", "contexts", "pieces"] = "documents"
    """What a row of token ids is: a document, a context made beforehand, or a piece that the next row goes on from."""
    rows_begin_with_bos: bool = False
    """Whether contexts or pieces have a BOS of their own in front."""
    masks: tuple[str, ...] = ()
    """The columns that say which token ids are text."""
    separator_after_bos: bool = True
    """Whether the separator of a document that just fits its context begins the next, after the BOS."""

    chat_template: str = ""
    """Digest of the template that conversations are written by."""

    @classmethod
    def from_json(cls, packing: Mapping[str, Any]) -> Self:
        """Return what an artifact recorded under ``packing``."""
        known = {name: packing[name] for name in cls._fields if name in packing}
        return cls(**{**known, **({"masks": tuple(known["masks"])} if "masks" in known else {})})

    def as_json(self) -> dict[str, JSON]:
        """Return what differs from the first release."""
        before = type(self)()
        changed = {name: value for name, value in self._asdict().items() if value != getattr(before, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


FIRST_RELEASE = Reading()


def choose_reading(
    settings: CapturedContexts,
    model: LanguageModel,
    documents: DocumentStream,
    recorded: Mapping[str, Any] | None = None,
) -> Reading:
    """Return how ``documents`` are read: as ``recorded`` of what is gone on with, else as settings and first rows say.

    Raises TextError if a setting does not suit them, or if the text beside token ids has other ids, and ModelError if
    they are conversations and the tokenizer has no template for them.
    """
    if settings.roles is not None and documents.kind != "chat":
        raise TextError(
            f"{documents.name}: --roles is for conversations, and column {documents.column.name!r} holds "
            f"{'text' if documents.kind == 'text' else 'token ids'}; leave it out, or pass --column"
        )
    template = model.chat_template_digest if documents.kind == "chat" else ""
    if recorded is not None:
        reading = Reading.from_json(recorded)
        if reading.chat_template != template:
            raise TextError(
                f"{documents.name}: its conversations were written by another chat template than this tokenizer's; use "
                "the tokenizer that was used before, or begin anew at another --out"
            )
    elif documents.kind != "tokens":
        if settings.token_rows != "auto":
            raise TextError(
                f"{documents.name}: --token-rows is for token ids, and column {documents.column.name!r} holds text; "
                "leave it out"
            )
        reading = Reading(
            special_tokens=settings.special_tokens,
            separator_after_bos=_may_follow_bos(model),
            chat_template=template,
        )
    else:
        _compare_with_text(documents, model)
        reading = _read_token_rows(settings, model, documents)
    documents.honour(reading.masks)
    return reading


def _may_follow_bos(model: LanguageModel) -> bool:
    """Tell whether a separator after a BOS says anything: not where they are the same token."""
    return model.bos_token_id != model.separator_token_id


def _read_token_rows(settings: CapturedContexts, model: LanguageModel, documents: DocumentStream) -> Reading:
    """Tell what rows of token ids are; special tokens inside contexts and pieces are the data's own."""
    masks = documents.column.masks
    padding = tuple(name for name in masks if name != SPECIAL_TOKENS_MASK)
    values = (read_row(row, documents.column._replace(masks=padding)) for row in documents.first_rows)
    rows = [value for value in values if isinstance(value, list) and value]
    begin_with_bos = all(row[0] == model.bos_token_id for row in rows)
    chosen = settings.token_rows
    if chosen == "auto":
        chosen = _tell_token_rows(rows, settings.context_length, documents.name, begin_with_bos=begin_with_bos)
    if chosen == "documents":
        return Reading(masks=masks, separator_after_bos=_may_follow_bos(model))
    return Reading(token_rows=chosen, rows_begin_with_bos=begin_with_bos, masks=padding)


def _tell_token_rows(
    rows: Sequence[list[int]], context_length: int, name: str, *, begin_with_bos: bool
) -> Literal["documents", "contexts", "pieces"]:
    """Tell from the first rows what rows are: text that was cut has rows of one length, documents have not."""
    lengths = {len(row) for row in rows}
    if len(rows) < 2 or len(lengths) > 1:
        return "documents"
    (length,) = lengths
    if length + (not begin_with_bos) == context_length:
        logger.info("%s: its rows are contexts of %d tokens and taken as they are", name, context_length)
        return "contexts"
    if length >= context_length - 1:
        logger.warning(
            "%s: every row has %d ids, so rows are pieces of longer text: no separator is put after them. To read each "
            "as a document, pass --token-rows documents",
            name,
            length,
        )
        return "pieces"
    logger.warning(
        "%s: every row has %d ids; each is read as a document. If they were cut from longer text, pass --token-rows "
        "pieces, or --context-length %d to take them as contexts",
        name,
        length,
        length + (not begin_with_bos),
    )
    return "documents"


def _compare_with_text(documents: DocumentStream, model: LanguageModel) -> None:
    """Raise TextError if the model's tokenizer makes other ids of the text beside the first token ids."""
    column = documents.column
    if column.text is None:
        return
    special = set(model.special_token_ids)
    for number, row in enumerate(documents.first_rows):
        ids = read_row(row, column)
        text = None if isinstance(row, BadRow) else row.get(column.text)
        if not isinstance(ids, list) or not isinstance(text, str) or not text.strip():
            continue
        ordinary = [at for at, token in enumerate(ids) if token not in special]
        if not ordinary:
            continue
        stored = ids[ordinary[0] : ordinary[-1] + 1]
        made, as_markup = (model.tokenize([text], is_markup=is_markup)[0] for is_markup in (False, True))
        if stored in (made[: len(stored)], as_markup[: len(stored)]):  # a long text may have been cut
            return
        raise TextError(
            f"{documents.name}: document {number} has ids in column {column.name!r} that this model's tokenizer does "
            f"not make of the text in column {column.text!r}: they begin {_begin(stored)}, wanted {_begin(made)}. "
            f"Another tokenizer made them: pass --column {column.text} to read the text, or --column {column.name} to "
            "read these ids all the same"
        )


def _begin(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids[:_SHOWN])) + (" …" if len(ids) > _SHOWN else "")
