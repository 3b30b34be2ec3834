"""Contexts of both splits from one pass over the documents, exactly resumable and extendable.

Documents are taken in batches, whose bounds follow from the documents alone. Each split has a position: its batch,
and how many of that batch's contexts were handed out. The state never holds more tokens than a context: resuming
tokenises one batch again. A split stays behind when it has enough rows while the other goes on:

* held-out rows are complete, but the last held-out document has tokens left;
* training rows are complete, but no held-out context is full yet, so documents to train on are passed over.

With larger targets, the split behind first catches up from where it stopped. So every document's tokens come exactly
once over all runs, and no document changes sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple, Self

import numpy as np

from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.tokenizer import ChatTokens
from tailrace.pipeline.text.columns import Kept, Message
from tailrace.pipeline.text.holdout import FIRST_DOCUMENTS, FirstChoices, HoldoutRule
from tailrace.pipeline.text.packer import NOTHING, Contexts, DocumentTokens, Packer, Partial, check_token_ids
from tailrace.pipeline.text.reading import FIRST_RELEASE, Reading, choose_reading
from tailrace.pipeline.text.settings import CapturedContexts, RowMask
from tailrace.pipeline.text.stream import Document, DocumentReader, DocumentStream
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import ModelError, SettingsError, TextError

logger = logging.getLogger(__name__)

TRAIN = "train"
HELDOUT = "heldout"
_OTHER = {TRAIN: HELDOUT, HELDOUT: TRAIN}

BATCH_DOCUMENTS = 256
"""Documents tokenised at once, at most."""

BATCH_WEIGHT = 1 << 20
"""A batch ends early once its documents weigh this much; see ``Document.weight``."""


FIRST_PROBLEMS = 5
"""Bad rows of each split that are recorded with their file, row and reason; the others are counted."""


class PackedContexts(NamedTuple):
    """Contexts of one split: token ids (n, T) int32, and each token's marked document (n, T) uint32."""

    split: str
    tokens: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class SplitPosition:
    """Where a split is: a batch, what waited when it began, and how far into the batch the split has come."""

    batch: int = 0
    documents: JSON = None
    partial: Partial = NOTHING
    emitted: int = 0
    is_counted: bool = False

    def to_json(self) -> dict[str, JSON]:
        """Return the position as JSON."""
        return {**asdict(self), "partial": self.partial.to_json()}


@dataclass(frozen=True)
class SplitCounts:
    """What a split has so far; ``stream_tokens`` are tokens and separators of its documents, packed or waiting."""

    contexts: int = 0
    rows: int = 0
    documents: int = 0
    empty_documents: int = 0
    stream_tokens: int = 0
    bad_rows: int = 0
    first_problems: tuple[str, ...] = ()
    """File, row and reason of the first bad rows."""

    def to_json(self) -> dict[str, JSON]:
        """Return the progress as JSON; bad rows only where there are any, as states of older caches."""
        return {
            name: value for name, value in asdict(self).items() if value or name not in ("bad_rows", "first_problems")
        }


class ContextSource:
    """Iterator of ``PackedContexts`` until the targets are reached or the dataset ends; ``finished`` says which.

    ``tokenize`` must treat each text by itself and add no special tokens. ``row_mask`` tells which positions become
    rows. ``targets`` are rows per split (None: all); a split stops with the context that reaches its target. The
    held-out target is the holdout rule's own unless given; once training is done, one held-out context is enough.
    Pre-tokenised documents lose one leading BOS and one trailing separator, since packing adds its own.
    Iterating again, or a new source with ``state``, goes on after the last item.

    Raises TextError, also while iterating, if the text cannot be read or cannot fill one context of each split.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenize: Callable[[list[str]], list[list[int]]],
        *,
        context_length: int,
        bos_token_id: int,
        separator_token_id: int,
        holdout: HoldoutRule,
        row_mask: RowMask,
        targets: Mapping[str, int | None],
        state: JSON | None = None,
        vocabulary_size: int | None = None,
        reading: Reading = FIRST_RELEASE,
        tokenize_chat: Callable[[list[Message]], ChatTokens] | None = None,
    ) -> None:
        if context_length < 2:
            raise SettingsError(f"context_length is {context_length}; wanted at least 2, for BOS and one token")
        self.finished: Literal["targets", "dataset"] | None = None
        self._stream = documents
        self._tokenize, self._tokenize_chat = tokenize, tokenize_chat
        self._packer = Packer(context_length, bos_token_id, separator_token_id, reading)
        self._holdout = holdout
        self._row_mask = row_mask
        self._vocabulary_size = vocabulary_size
        self._has_warned = False
        self._kept: dict[str, list[Kept]] = {}
        heldout = targets[HELDOUT] if HELDOUT in targets else holdout.target_rows(targets[TRAIN])
        self._targets = {TRAIN: targets[TRAIN], HELDOUT: None if heldout is None else max(1, heldout)}
        self._load(state)

    @classmethod
    def of(
        cls,
        settings: CapturedContexts,
        model: LanguageModel,
        documents: DocumentStream,
        targets: Mapping[str, int | None],
        state: JSON | None = None,
        reading: Reading | None = None,
    ) -> Self:
        """Return the contexts of ``documents`` as ``settings`` ask for them, in the tokens of ``model``.

        ``reading`` is chosen from settings and first rows unless given. Raises ModelError if the model cannot read
        contexts that long.
        """
        if settings.context_length > model.max_context_length:
            raise ModelError(
                f"--context-length {settings.context_length} is more than the model's {model.max_context_length}; "
                f"use at most {model.max_context_length}"
            )
        reading = reading or choose_reading(settings, model, documents)
        is_markup = reading.special_tokens == "markup"
        roles = settings.roles and settings.roles.split(",")
        return cls(
            documents,
            lambda texts: model.tokenize(texts, is_markup=is_markup),
            context_length=settings.context_length,
            bos_token_id=model.bos_token_id,
            separator_token_id=model.separator_token_id,
            holdout=HoldoutRule.parse(settings.holdout, settings.seed),
            row_mask=settings.rows_of(model),
            targets=targets,
            state=state,
            vocabulary_size=model.d_vocab,
            reading=reading,
            tokenize_chat=lambda messages: model.tokenize_chat(messages, is_markup=is_markup, roles=roles or ()),
        )

    def _load(self, state: JSON | None) -> None:
        saved = state or {"lanes": {}, "progress": {}, "held": [], "n_assigned": 0, "first": None}
        self._positions = {split: SplitPosition() for split in _OTHER}
        for split, position in saved["lanes"].items():
            self._positions[split] = SplitPosition(**{**position, "partial": Partial.from_json(position["partial"])})
        self._progress = {split: SplitCounts(**saved["progress"].get(split, {})) for split in _OTHER}
        # (batch, document) of each held-out document that chance picked, for the batches that a split is still at or
        # has yet to come to. Batches below `_n_assigned` are decided.
        self._held = [(batch, document) for batch, document in saved["held"]]
        self._n_assigned: int = saved["n_assigned"]
        self._first = None if saved["first"] is None else FirstChoices(*saved["first"])

    @property
    def state(self) -> dict[str, JSON]:
        """A JSON value from which a source with any targets goes on right after the last item."""
        return {
            # "lanes": the key that published caches have
            "lanes": {split: position.to_json() for split, position in self._positions.items()},
            "progress": {split: progress.to_json() for split, progress in self._progress.items()},
            "held": [list(pair) for pair in self._held],
            "n_assigned": self._n_assigned,
            "first": None if self._first is None else list(self._first),
        }

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Per split: contexts, their tokens and rows, documents read, and how many of them were empty or bad rows.

        ``bad_rows`` is there only where there were any. ``partial_tokens`` were read but lie in no context handed out:
        they wait for a run that extends this one.
        """
        return {split: self._counts_of(progress) for split, progress in self._progress.items()}

    def _counts_of(self, progress: SplitCounts) -> dict[str, int]:
        return {
            "contexts": progress.contexts,
            "tokens": progress.contexts * self._packer.context_length,
            "rows": progress.rows,
            "documents": progress.documents,
            "empty_documents": progress.empty_documents,
            "partial_tokens": progress.stream_tokens - progress.contexts * (self._packer.context_length - 1),
            **({"bad_rows": progress.bad_rows} if progress.bad_rows else {}),
        }

    @property
    def first_problems(self) -> list[str]:
        """File, row and reason of the first bad rows of each split."""
        return [problem for progress in self._progress.values() for problem in progress.first_problems]

    def take_kept(self) -> dict[str, list[Kept]]:
        """Return by split the documents read since the last call, each once over all runs, with their kept columns.

        Documents without a token lie in no context, and are left out.
        """
        kept, self._kept = self._kept, {}
        return kept

    def __iter__(self) -> Iterator[PackedContexts]:
        reader, reader_batch = None, -1
        while not self._is_done():
            self._skip_decided_batches()
            active = self._active_splits()
            position = self._positions[active[0]]
            if reader is None or position.batch != reader_batch:
                reader, reader_batch = self._stream.read_from(position.documents), position.batch
            self._choose_first(reader)
            batch = _read_batch(reader)
            if not batch:
                self._check_both_splits()
                self.finished = "dataset"
                return
            reader_batch += 1
            packed = self._pack(batch, active)
            for split in active:
                yield from self._hand_out(split, *packed[split], reader.state)
        self.finished = "targets"

    def _reached(self, split: str) -> bool:
        target = self._targets[split]
        return target is not None and self._progress[split].rows >= target

    def _is_done(self) -> bool:
        return self._reached(TRAIN) and (not self._holdout.holds_out or self._progress[HELDOUT].contexts > 0)

    def _active_splits(self) -> list[str]:
        """Return the splits that want rows and are at the earliest batch of those; held-out first."""
        wanting = [HELDOUT] if self._holdout.holds_out and not self._reached(HELDOUT) else []
        wanting += [] if self._reached(TRAIN) else [TRAIN]
        earliest = min(self._positions[split].batch for split in wanting)
        return [split for split in wanting if self._positions[split].batch == earliest]

    def _skip_decided_batches(self) -> None:
        """Let held-out documents jump to training's position if chance picked none between; a list must be read."""
        position, front = self._positions[HELDOUT], self._positions[TRAIN]
        if position.batch < front.batch and not self._held and not self._holdout.listed:
            self._positions[HELDOUT] = SplitPosition(front.batch, front.documents, position.partial)

    def _choose_first(self, reader: DocumentReader) -> None:
        if self._first is None and self._holdout.fraction:
            self._first = self._holdout.first_choices(reader.upcoming_indices(FIRST_DOCUMENTS))

    def _pack(self, batch: list[Document], active: Sequence[str]) -> dict[str, tuple[Contexts, Partial]]:
        """Pack a batch for the active splits, deciding which of its documents are held out unless that is decided."""
        number = self._positions[active[0]].batch
        held = self._candidates(batch, number, active)
        tokens = self._token_arrays(
            [document for document in batch if (HELDOUT if document.index in held else TRAIN) in active]
        )
        packed = {}
        if HELDOUT in active:
            offered = [document for document in tokens if document.document in held]
            held, contexts, partial = self._hold_out(offered, number)
            packed[HELDOUT] = (contexts, partial)
            own = [document for document in offered if document.document in held]
            self._count(HELDOUT, batch, own, contexts, partial)
        self._assign(number, held)
        if TRAIN in active:
            trained = [document for document in tokens if document.document not in held]
            packed[TRAIN] = self._packer.add(self._positions[TRAIN].partial, trained)
            self._count(TRAIN, batch, trained, *packed[TRAIN])
        return packed

    def _candidates(self, batch: list[Document], number: int, active: Sequence[str]) -> set[int]:
        """Return the held-out documents of a batch; where chance picks among them, those it may pick."""
        if not self._holdout.listed and number < self._n_assigned:
            return {document for held_batch, document in self._held if held_batch == number}
        if not self._holdout.listed and HELDOUT not in active:
            return set()
        limited = self._targets[HELDOUT] is not None
        indices = (document.index for document in batch)
        return {index for index in indices if self._holdout.is_candidate(index, self._first, limited=limited)}

    def _hold_out(self, offered: list[DocumentTokens], batch: int) -> tuple[set[int], Contexts, Partial]:
        """Pack the held-out documents in turn, since chance takes no further one once there are enough rows."""
        target = self._targets[HELDOUT]
        rows = self._progress[HELDOUT].rows
        by_chance = batch >= self._n_assigned and not self._holdout.listed
        partial = self._positions[HELDOUT].partial
        held: set[int] = set()
        pieces: list[Contexts] = []
        for document in offered:
            if by_chance and target is not None and rows >= target:
                break
            contexts, partial = self._packer.add(partial, [document])
            held.add(document.document)
            pieces.append(contexts)
            rows += int(self._row_mask(*contexts).sum())
        empty, _ = self._packer.add(NOTHING, [])
        pieces.append(empty)
        joined = Contexts(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
        return held, joined, partial

    def _assign(self, batch: int, held: set[int]) -> None:
        if batch >= self._n_assigned:
            self._n_assigned = batch + 1
            if not self._holdout.listed:
                self._held += [(batch, document) for document in sorted(held)]

    def _token_arrays(self, documents: list[Document]) -> list[DocumentTokens]:
        if self._stream.kind == "tokens":
            return [self._fit(document) for document in documents]
        if self._stream.kind == "chat":
            return [self._write_chat(document) for document in documents]
        tokenized = self._tokenize([document.text or "" for document in documents]) if documents else []
        return [
            DocumentTokens(document.index, self._check_ordinary(document.index, tokens), document.problem)
            for document, tokens in zip(documents, tokenized, strict=True)
        ]

    def _write_chat(self, document: Document) -> DocumentTokens:
        """Return a conversation as the model's chat template writes it, without the boundaries that packing adds."""
        assert self._tokenize_chat is not None, "conversations come with a tokenizer's template"
        if document.messages is None:
            return DocumentTokens(document.index, NOTHING.tokens, document.problem)
        try:
            ids, left_out = self._tokenize_chat(document.messages)
        except TextError as error:
            return self._pass_over(document, f"is no conversation for this model's chat template: {error}")
        tokens = self._check_text(document.index, ids)
        own = self._packer.between_boundaries(tokens)
        return DocumentTokens(
            document.index, tokens[own], left_out=None if left_out is None else np.array(left_out, bool)[own]
        )

    def _fit(self, document: Document) -> DocumentTokens:
        """Return a pre-tokenised document as it is packed; raise TextError, or note it, if it should be a context."""
        tokens = check_token_ids(document.index, document.tokens or [], self._vocabulary_size)
        if misfit := self._packer.misfit(tokens):
            return self._pass_over(document, misfit, "; or read every row as a document with --token-rows documents")
        return DocumentTokens(document.index, self._packer.strip_boundaries(tokens), document.problem)

    def _pass_over(self, document: Document, problem: str, other_step: str = "") -> DocumentTokens:
        """Return a row that turned out to be no document as a bad row; raise TextError unless they are passed over."""
        if not self._stream.skips_bad_rows:
            raise TextError(
                f"{self._stream.name}: document {document.index} {problem}. Pass over such rows with --on-bad-row skip"
                + other_step
            )
        return DocumentTokens(document.index, NOTHING.tokens, f"document {document.index}: {problem}")

    def _check_text(self, document: int, ids: list[int]) -> np.ndarray:
        """Return the token ids of a text; raise TextError if the model has no embedding for one of them."""
        tokens = np.array(ids, dtype=np.int32)
        limit = self._vocabulary_size
        if limit is not None and len(tokens) and tokens.max() >= limit:
            step = "" if self._packer.reading.special_tokens == "text" else ", pass --special-tokens text"
            raise TextError(
                f"document {document}: the tokenizer reads token {tokens.max()} in its text, which the model has no "
                f"embedding for: its ids are 0 to {limit - 1}. Leave the document out{step}, or give the model an "
                "embedding (resize_token_embeddings)"
            )
        return tokens

    def _check_ordinary(self, document: int, ids: list[int]) -> np.ndarray:
        """Return the token ids of a text; warn once if letters can only be read as a token that means a boundary."""
        tokens = self._check_text(document, ids)
        if self._packer.reading.special_tokens == "text" and not self._has_warned:
            boundary = np.isin(tokens, (self._packer.bos_token_id, self._packer.separator_token_id))
            if boundary.any():
                self._has_warned = True
                logger.warning(
                    "%s: the tokenizer has no other way to read the text of document %d than with token %d, which also "
                    "begins contexts or ends documents",
                    *(self._stream.name, document, tokens[boundary][0]),
                )
        return tokens

    def _count(
        self,
        split: str,
        batch: Sequence[Document],
        documents: Sequence[DocumentTokens],
        contexts: Contexts,
        partial: Partial,
    ) -> None:
        """Count those documents of a batch that became these contexts of a split and left this partial one."""
        if self._positions[split].is_counted:
            return
        if self._stream.kept:
            kept = {document.index: document.kept for document in batch}
            self._kept.setdefault(split, []).extend(
                {"document": one.document, **kept[one.document]} for one in documents if len(one.tokens)
            )
        n_before = len(self._positions[split].partial.tokens)
        n_added = len(contexts.tokens) * (self._packer.context_length - 1) + len(partial.tokens) - n_before
        progress = self._progress[split]
        problems = [document.problem for document in documents if document.problem is not None]
        n_empty = sum(len(document.tokens) == 0 for document in documents) - len(problems)
        self._progress[split] = replace(
            progress,
            documents=progress.documents + len(documents),
            empty_documents=progress.empty_documents + n_empty,
            bad_rows=progress.bad_rows + len(problems),
            first_problems=(*progress.first_problems, *problems)[:FIRST_PROBLEMS],
            stream_tokens=progress.stream_tokens + n_added,
        )
        self._positions[split] = replace(self._positions[split], is_counted=True)

    def _hand_out(self, split: str, contexts: Contexts, partial: Partial, after: JSON) -> Iterator[PackedContexts]:
        """Yield what the target leaves of a batch's contexts; the split moves on once all were handed out."""
        position = self._positions[split]
        rows = self._row_mask(*(array[position.emitted :] for array in contexts)).sum(axis=1, dtype=np.int64)
        n = self._n_wanted(split, rows)
        self._positions[split] = replace(position, emitted=position.emitted + n)
        if n:
            progress = self._progress[split]
            self._progress[split] = replace(
                progress, contexts=progress.contexts + n, rows=progress.rows + int(rows[:n].sum())
            )
            chosen = slice(position.emitted, position.emitted + n)
            yield PackedContexts(split, contexts.tokens[chosen], contexts.documents[chosen])
        if n == len(rows):
            self._positions[split] = SplitPosition(position.batch + 1, after, partial)
            self._forget_passed_batches()

    def _n_wanted(self, split: str, rows: np.ndarray) -> int:
        """Return how many of the next contexts, with so many rows each, are needed to reach the split's target."""
        target = self._targets[split]
        if target is None:
            return len(rows)
        missing = target - self._progress[split].rows
        return min(len(rows), int(np.searchsorted(np.cumsum(rows), missing)) + 1) if missing > 0 else 0

    def _forget_passed_batches(self) -> None:
        if self._held:
            earliest = min(position.batch for position in self._positions.values())
            self._held = [(batch, document) for batch, document in self._held if batch >= earliest]

    def _check_both_splits(self) -> None:
        """Raise TextError if the dataset ended before each split that is wanted filled one context."""
        counts = self.counts
        n_documents = sum(count["documents"] for count in counts.values())
        wanted = f"one context needs {self._packer.context_length - 1}"
        if counts[TRAIN]["contexts"] == 0:
            raise TextError(
                f"the dataset is too short: its {counts[TRAIN]['documents']} documents for training hold "
                f"{counts[TRAIN]['partial_tokens']} tokens, and {wanted}; give more text or a smaller context length"
            )
        if not self._holdout.holds_out or counts[HELDOUT]["contexts"]:
            return
        held = counts[HELDOUT]
        present = (
            f"{held['documents']} of its documents were held out, with {held['partial_tokens']} tokens, and {wanted}"
        )
        raise TextError(
            f"the dataset has no held-out context: {present}; pass a larger --holdout, documents that exist "
            f"({n_documents} were read), or --holdout 0"
        )


def _read_batch(reader: DocumentReader) -> list[Document]:
    documents: list[Document] = []
    weight = 0
    for document in reader:
        documents.append(document)
        weight += document.weight
        if len(documents) == BATCH_DOCUMENTS or weight >= BATCH_WEIGHT:
            break
    return documents
