"""Packing contexts to disk ahead of the language model, in a thread, resumable at the block.

The source's state and the contexts that do not fill a block yet are saved in one file after every block, so a kill
loses at most the packing of one block, which comes out the same again.
"""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from tailrace.pipeline.text.columns import Kept
from tailrace.pipeline.text.packing import ContextSource
from tailrace.pipeline.text.settings import RowMask
from tailrace.storage.artifact import JSON, canonical_json, read_json
from tailrace.storage.cache_format import CacheFormat, documents_name, packing_name
from tailrace.storage.cache_publish import write_file
from tailrace.storage.cache_writer import ContextBlocks, write_sealed
from tailrace.storage.errors import ActionableError
from tailrace.storage.parsing import LONGEST_LOG, read_regular

logger = logging.getLogger(__name__)

CHECKPOINT = "draft/packing.npz"
DOCUMENTS_PER_FILE = 1 << 14
"""Few enough that the last ones, which every checkpoint holds, are saved in milliseconds."""


class PackingProgress:
    """How many contexts and rows of each split are on disk; shared between the packer and whoever waits for rows."""

    def __init__(self, contexts_per_batch: int, row_mask: RowMask) -> None:
        self._per_batch, self._row_mask = contexts_per_batch, row_mask
        self._rows_per_context: dict[str, list[np.ndarray]] = {}
        self._n_contexts: dict[str, int] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.is_done = False

    def add(self, split: str, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Note contexts (n, context_length) that are on disk now."""
        rows = np.asarray(self._row_mask(tokens, documents).sum(axis=1), np.int64)
        with self._changed:
            self._rows_per_context.setdefault(split, []).append(rows)
            self._n_contexts[split] = self.n_contexts(split) + len(rows)
            self._changed.notify_all()

    def add_committed(self, split: str, blocks: ContextBlocks, n_contexts: int, block_contexts: int) -> None:
        """Note the first ``n_contexts`` contexts of a split, which were committed before, a block at a time."""
        for start in range(0, n_contexts, block_contexts):
            self.add(split, *blocks.read(start, min(start + block_contexts, n_contexts)))

    def finish(self, error: BaseException | None = None) -> None:
        """Note that nothing more will come."""
        with self._changed:
            self.is_done, self._error = True, error
            self._changed.notify_all()

    def n_contexts(self, split: str) -> int:
        """Return how many contexts of a split are on disk."""
        return self._n_contexts.get(split, 0)

    def n_rows(self, split: str) -> int:
        """Return how many rows those contexts give."""
        return int(sum(int(rows.sum()) for rows in self._rows_per_context.get(split, [])))

    def batch_rows(self, split: str) -> np.ndarray:
        """Return int64 (n_batches,): rows of every grid batch whose contexts are on disk; the last may be short."""
        rows = np.concatenate(self._rows_per_context.get(split, [np.zeros(0, np.int64)]))
        return np.add.reduceat(rows, np.arange(0, len(rows), self._per_batch)) if len(rows) else rows

    def wait_for_batch(self, split: str, n_rows: int) -> bool:
        """Wait until complete grid batches give ``n_rows`` rows, or packing ended; tell which. Raises its error."""
        return self._wait(lambda: self._batches_give(split, n_rows))

    def wait_for_contexts(self, split: str, n_contexts: int) -> None:
        """Wait until ``n_contexts`` contexts are on disk, or packing ended. Raises its error."""
        self._wait(lambda: self.n_contexts(split) >= n_contexts)

    def wait_until_done(self) -> None:
        """Wait until packing ended; raise its error."""
        self._wait(lambda: False)

    def _wait(self, is_ready: Callable[[], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.is_done or is_ready())
            if self._error is not None:
                raise self._error
            return is_ready()

    def _batches_give(self, split: str, n_rows: int) -> bool:
        n_batches = self.n_contexts(split) // self._per_batch
        return int(self.batch_rows(split)[:n_batches].sum()) >= n_rows


class DocumentFiles:
    """The files of a generation that hold the kept columns, ``DOCUMENTS_PER_FILE`` documents of a split in each.

    Those that do not fill a file yet wait, and lie in the checkpoint meanwhile.
    """

    def __init__(self, root: Path, generation: int) -> None:
        self._root, self._generation = root, generation
        self._waiting: dict[str, list[Kept]] = {}
        self._n_full: dict[str, int] = {}

    def add(self, kept: Mapping[str, list[Kept]]) -> None:
        """Take documents by split; write the files that are full now."""
        for split, documents in kept.items():
            waiting = self._waiting.setdefault(split, [])
            waiting += documents
            while len(waiting) >= DOCUMENTS_PER_FILE:
                self._write(split, waiting[:DOCUMENTS_PER_FILE])
                del waiting[:DOCUMENTS_PER_FILE]
                self._n_full[split] = self._n_full.get(split, 0) + 1

    def finish(self) -> None:
        """Write the short last files."""
        for split, documents in self._waiting.items():
            if documents:
                self._write(split, documents)

    def names(self) -> dict[str, list[str]]:
        """Return the files by split, once all are written."""
        numbers = {split: self._n_full.get(split, 0) + bool(waiting) for split, waiting in self._waiting.items()}
        return {
            split: [documents_name(self._generation, split, number) for number in range(n)]
            for split, n in numbers.items()
        }

    def as_json(self) -> dict[str, JSON]:
        """Return what a checkpoint holds; nothing where no columns are kept."""
        return {"documents": [self._waiting, self._n_full]} if self._waiting else {}

    def load(self, checkpoint: Mapping[str, JSON]) -> None:
        """Go on after a checkpoint."""
        if "documents" in checkpoint:
            self._waiting, self._n_full = checkpoint["documents"]

    def _write(self, split: str, documents: Sequence[Kept]) -> None:
        lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        name = documents_name(self._generation, split, self._n_full.get(split, 0))
        write_sealed(self._root, name, lines.encode())


class ContextPacker:
    """Writes what a ContextSource packs into blocks, and remembers where it stands."""

    def __init__(
        self,
        root: Path,
        layout: CacheFormat,
        blocks: Mapping[str, ContextBlocks],
        progress: PackingProgress,
        generation: int,
    ) -> None:
        self.documents = DocumentFiles(root, generation)
        """What is kept of the dataset's columns."""
        self._root, self._layout, self._blocks, self._progress = root, layout, blocks, progress
        self._pending: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {split: [] for split in blocks}
        self._n_blocks = dict.fromkeys(blocks, 0)
        self.state: dict[str, Any] | None = None
        """State of the source after what is on disk and pending; None at the start."""

    def restore(self) -> bool:
        """Continue from the checkpoint of an interrupted draft, if it is there and whole, and so are its blocks."""
        path = self._root / CHECKPOINT
        if not path.exists():
            return False
        try:
            with np.load(io.BytesIO(read_regular(path, LONGEST_LOG))) as saved:  # a zip file: every part has a checksum
                parts = {name: saved[name] for name in saved.files}
            checkpoint = json.loads(parts["state"].tobytes())
            for split, blocks in self._blocks.items():
                blocks.check(checkpoint["n_blocks"][split])
                self._set_pending(split, parts[f"{split}-tokens"], parts[f"{split}-documents"])
        except (ActionableError, OSError, ValueError, KeyError, EOFError, NotImplementedError, BadZipFile) as error:
            logger.warning("%s: %s; the text is packed again from where it was begun", path, error)
            self._pending = {split: [] for split in self._blocks}
            return False
        self.state, self._n_blocks = checkpoint["source"], checkpoint["n_blocks"]
        self.documents.load(checkpoint)
        return True

    def continue_from(self, state: dict[str, Any], n_contexts: Mapping[str, int]) -> None:
        """Continue after a published generation: its short last blocks become pending again."""
        self.state = state
        for split, n in n_contexts.items():
            self._n_blocks[split] = n // self._layout.block_contexts
            start = self._n_blocks[split] * self._layout.block_contexts
            if n > start:
                self._set_pending(split, *self._blocks[split].read(start, n))

    @contextmanager
    def running(self, source: ContextSource, check: Callable[[], None]) -> Iterator[None]:
        """Pack in a thread beside the block, then ``check``; whoever waits for rows is given the thread's error.

        The thread is stopped at the end of the block.
        """
        stopped = threading.Event()

        def work() -> None:
            try:
                self._pack(source, stopped)
                if not stopped.is_set():
                    check()
            except BaseException as error:
                self._progress.finish(error)
            else:
                self._progress.finish()

        size = self._layout.block_contexts
        for split, blocks in self._blocks.items():
            self._progress.add_committed(split, blocks, self._n_blocks[split] * size, size)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def _pack(self, source: ContextSource, stopped: threading.Event) -> None:
        """Pack until the source is finished, committing block after block; flush the short last ones."""
        for packed in source:
            self._pending[packed.split].append((packed.tokens, packed.documents))
            if self._commit_full_blocks(packed.split):
                self._save(source)
            if stopped.is_set():
                return
        self._save(source)
        self.documents.finish()
        for split in self._blocks:
            tokens, documents = self._join(split)
            if len(tokens):
                self._blocks[split].write(self._n_blocks[split], tokens, documents)
                self._progress.add(split, tokens, documents)

    def _commit_full_blocks(self, split: str) -> bool:
        size = self._layout.block_contexts
        if sum(len(tokens) for tokens, _ in self._pending[split]) < size:
            return False
        tokens, documents = self._join(split)
        n_full = len(tokens) // size * size
        for start in range(0, n_full, size):
            piece = slice(start, start + size)
            self._blocks[split].write(self._n_blocks[split], tokens[piece], documents[piece])
            self._n_blocks[split] += 1
            self._progress.add(split, tokens[piece], documents[piece])
        self._set_pending(split, tokens[n_full:], documents[n_full:])
        return True

    def _join(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        length = self._layout.context_length
        if not self._pending[split]:
            return np.zeros((0, length), np.int32), np.zeros((0, length), np.uint32)
        tokens, documents = zip(*self._pending[split], strict=True)
        return np.concatenate(tokens), np.concatenate(documents)

    def _set_pending(self, split: str, tokens: np.ndarray, documents: np.ndarray) -> None:
        self._pending[split] = [(tokens, documents)] if len(tokens) else []

    def _save(self, source: ContextSource) -> None:
        self.state = source.state
        self.documents.add(source.take_kept())
        arrays: dict[str, np.ndarray] = {}
        for split in self._blocks:
            arrays[f"{split}-tokens"], arrays[f"{split}-documents"] = self._join(split)
        checkpoint = json.dumps({"source": self.state, "n_blocks": self._n_blocks, **self.documents.as_json()}).encode()
        buffer = io.BytesIO()
        arrays["state"] = np.frombuffer(checkpoint, np.uint8)
        np.savez(buffer, allow_pickle=False, **arrays)
        write_file(self._root / CHECKPOINT, buffer.getvalue())


def packing_state(source: ContextSource) -> bytes:
    """Return what that file holds: the source's state, and whether it stopped because the dataset ended."""
    return canonical_json({"finished": source.finished, "state": source.state})


def last_packing(root: Path, generation: int) -> dict[str, Any]:
    """Return where packing stands at a generation, as the last one that packed anything left it."""
    packed = [root / packing_name(number) for number in range(generation + 1)]
    return dict(read_json([path for path in packed if path.exists()][-1]))


def dataset_ended(root: Path, generation: int) -> bool:
    """Return whether a generation holds every context of its dataset."""
    return bool(last_packing(root, generation)["finished"] == "dataset")
