"""Columns of a dataset: which holds the documents, and what a row says there.

Columns are judged by their Arrow type, never by the first value alone: a first row that is empty or missing says
nothing about the rest, and a column called ``tokens`` often holds words rather than ids.
"""

from __future__ import annotations

import datetime
import difflib
import logging
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from tailrace.storage.errors import TextError

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "content", "document", "raw_content", "article", "passage", "sentence")

CHAT_COLUMNS = ("messages", "conversations", "conversation")
ATTENTION_MASK, SPECIAL_TOKENS_MASK, LENGTH = "attention_mask", "special_tokens_mask", "length"

_CHAT_KEYS = (("role", "content"), ("from", "value"))
"""Who speaks and what is said in a message: as chat templates call it, and as ShareGPT does."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles."""

Kind = Literal["text", "tokens", "chat"]

Message = dict[str, Any]
"""A message of a conversation: ``role``, ``content``, and what else a chat template may ask for."""


class Conversation(NamedTuple):
    """The messages that a row holds, in order."""

    messages: list[Message]


class BadRow(NamedTuple):
    """A row that is no document."""

    reason: str
    """What is wrong, to be read after the row's name."""


Row = dict[str, Any] | BadRow
"""Values by column, or why there are none."""

Kept = dict[str, str | int | float | bool | None]
"""What a row says in the columns that are kept beside its text."""


class Padding(NamedTuple):
    """What fills rows of token ids up to one length, learnt from rows that say how many of their ids are text."""

    token_id: int
    is_left: bool


class Column(NamedTuple):
    """The column that documents are taken from, what it holds, and what says more about it."""

    name: str
    kind: Kind
    masks: tuple[str, ...] = ()
    """Columns that say which of the token ids are text."""
    text: str | None = None
    """A column of text beside token ids that nobody asked for by name."""
    padding: Padding | None = None
    """What rows are filled up with, where ``masks`` has their length."""

    @property
    def names(self) -> list[str]:
        """Every column that is read."""
        return [self.name, *self.masks]


def choose_column(
    schema: pa.Schema, wanted: str | None, dataset: str, first_rows: Callable[[], Sequence[Row]] = list
) -> Column:
    """Return the column named ``wanted``, or else the first usable one of the customary names; token ids win.

    Raises TextError that lists every column with its type when ``wanted`` is absent or of another type, or when no
    customary name is usable. It advises columns that hold text or token ids in ``first_rows``, never labels.
    """
    kinds: dict[str, Kind] = {field.name: kind for field in schema if (kind := kind_of(field.type)) is not None}
    if wanted is not None:
        if wanted in kinds:
            return Column(wanted, kinds[wanted], _masks(schema, kinds[wanted]))
        raise TextError(_refusal(schema, kinds, wanted, dataset, first_rows()))
    usable = [name for name in TOKEN_COLUMNS if kinds.get(name) == "tokens"]
    usable += [name for name in TEXT_COLUMNS if kinds.get(name) == "text"]
    usable += [name for name in CHAT_COLUMNS if kinds.get(name) == "chat"]
    if not usable:
        raise TextError(_refusal(schema, kinds, None, dataset, first_rows()))
    chosen, kind = usable[0], kinds[usable[0]]
    texts = [name for name in usable if kinds[name] == "text"] if kind == "tokens" else []
    if len(usable) > 1:
        level = logging.WARNING if texts else logging.INFO
        logger.log(level, "%s: reading column %r; pass --column to read %s", dataset, chosen, " or ".join(usable[1:]))
    return Column(chosen, kind, _masks(schema, kind), texts[0] if texts else None)


def _masks(schema: pa.Schema, kind: Kind) -> tuple[str, ...]:
    """Return the columns that say which of the token ids are text; lengths say nothing that a mask does not."""
    if kind != "tokens":
        return ()
    types = {field.name: field.type for field in schema}
    masks = [name for name in (ATTENTION_MASK, SPECIAL_TOKENS_MASK) if name in types and _is_mask(types[name])]
    if ATTENTION_MASK not in masks and LENGTH in types and pa.types.is_integer(types[LENGTH]):
        masks.append(LENGTH)
    return tuple(masks)


def _is_mask(column_type: pa.DataType) -> bool:
    return kind_of(column_type) == "tokens" or (
        pa.types.is_list(column_type) and pa.types.is_boolean(column_type.value_type)
    )


def check_kept(schema: pa.Schema, kept: Sequence[str], dataset: str) -> None:
    """Raise TextError unless every column of ``kept`` is there and may hold texts, numbers, dates, or true and false.

    The error names every column that is wrong.
    """
    problems = []
    for name in kept:
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1, cutoff=0.5)
            meant = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"  {name}: there is no such column; there are {', '.join(schema.names)}{meant}")
        elif pa.types.is_nested(schema.field(name).type) or pa.types.is_binary(schema.field(name).type):
            problems.append(f"  {name}: holds {schema.field(name).type}; wanted texts, numbers, or true and false")
    if problems:
        raise TextError("\n".join([f"{dataset}: not every column of --keep-columns can be kept:", *problems]))


def read_kept(row: Row, kept: Sequence[str]) -> Kept | BadRow:
    """Return what a row says in the columns ``kept``, as JSON has it; null where it says nothing, or no number.

    Dates and decimal numbers become texts. A list or an object makes the row a bad one.
    """
    if isinstance(row, BadRow):
        return row
    values: Kept = {}
    for name in kept:
        value = row.get(name)
        match value:
            case datetime.date() | datetime.time():  # date and time together are a date too
                value = value.isoformat()
            case datetime.timedelta() | Decimal():
                value = str(value)
            case float() if not math.isfinite(value):
                value = None
            case str() if not value.isascii() and isinstance(checked := _check_text(value), BadRow):
                return checked
            case None | str() | bool() | int() | float():
                pass
            case _:
                return BadRow(
                    f"holds {value!r:.60} in column {name!r}, which --keep-columns keeps; wanted a text, a number, "
                    "true, false or null"
                )
        values[name] = value
    return values


def learn_padding(column: Column, rows: Sequence[Row]) -> Column:
    """Return the column with the padding that the first rows show where they tell their lengths.

    A column called ``length`` counts something else, such as letters, where the ids beyond it are not one token
    repeated, the same in all rows: it is then left alone.
    """
    if LENGTH not in column.masks:
        return column
    shown: list[set[Padding]] = []
    for row in rows:
        ids = read_row(row, column._replace(masks=()))
        length = None if isinstance(row, BadRow) else row.get(LENGTH)
        if isinstance(ids, list) and type(length) is int and length != len(ids):
            shown.append({padding for padding in _paddings(ids, length) if _pads(padding, ids, length)})
    common = set.intersection(*shown) if shown else set()
    if shown and not common:
        return column._replace(masks=tuple(name for name in column.masks if name != LENGTH))
    return column._replace(padding=min(common, key=lambda padding: padding.is_left)) if common else column


def _paddings(ids: list[int], length: int) -> list[Padding]:
    return [Padding(ids[-1], False), Padding(ids[0], True)] if 0 <= length < len(ids) else []


def _pads(padding: Padding, ids: list[int], length: int) -> bool:
    rest = ids[: len(ids) - length] if padding.is_left else ids[length:]
    return all(token == padding.token_id for token in rest)


def kind_of(column_type: pa.DataType) -> Kind | None:
    """Tell what a column of this Arrow type can be read as: text, token ids, conversations, or none of these."""
    if pa.types.is_string(column_type) or pa.types.is_large_string(column_type):
        return "text"
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    if (is_list or pa.types.is_fixed_size_list(column_type)) and pa.types.is_integer(column_type.value_type):
        return "tokens"
    if is_list and pa.types.is_struct(column_type.value_type):
        fields = {field.name for field in column_type.value_type}
        return "chat" if any(fields.issuperset(keys) for keys in _CHAT_KEYS) else None
    return None


def infer_schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """Return the Arrow types of the first rows of a dataset that declares none, each column judged by itself."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.schema([(name, _infer_type([row.get(name) for row in rows])) for name in names])


def _infer_type(values: list[Any]) -> pa.DataType:
    """Return the type that all values share; where they share none, that of the first text or list of token ids.

    The row that differs is then named when its turn comes.
    """
    unreadable = (pa.ArrowException, OverflowError, UnicodeEncodeError)
    try:
        return pa.array(values).type
    except unreadable:
        if any(isinstance(value, str) for value in values):
            return pa.string()
        lists = [value for value in values if isinstance(value, list) and value]
        for keys in _CHAT_KEYS:
            if any(_is_message(item, keys) for value in lists for item in value):
                return pa.list_(pa.struct([(key, pa.string()) for key in keys]))
        ids = (value for value in lists if all(type(item) is int for item in value))
        try:
            return pa.array([next(ids, None)]).type
        except unreadable:
            return pa.null()


def _is_message(item: Any, keys: tuple[str, str]) -> bool:
    return isinstance(item, dict) and all(key in item for key in keys)


def _refusal(
    schema: pa.Schema, kinds: dict[str, Kind], wanted: str | None, dataset: str, first_rows: Sequence[Row]
) -> str:
    if wanted is None:
        names = ", ".join(TOKEN_COLUMNS + TEXT_COLUMNS + CHAT_COLUMNS)
        problem = f"has no column named {names} that holds text, token ids or conversations"
    elif wanted in schema.names:
        problem = (
            f"column {wanted!r} holds {schema.field(wanted).type}, wanted text, lists of token ids or conversations"
        )
    else:
        problem = f"has no column {wanted!r}"
    near = difflib.get_close_matches(wanted, schema.names, n=2, cutoff=0.5) if wanted else []
    readable = [
        name
        for name in kinds
        if _is_like(kinds[name], [row.get(name) for row in first_rows if not isinstance(row, BadRow)])
    ]
    offers = [name for name in near if name in readable] or readable
    other = "choose another dataset; no column here holds running text" if kinds else "choose another dataset"
    step = f"pass --column {' or --column '.join(offers)}" if offers else other
    lines = [f"  {field.name}: {field.type}" for field in schema]
    return "\n".join([f"{dataset}: {problem}. Its columns are:", *lines, f"To go on, {step}"])


def _is_like(kind: Kind, values: Sequence[Any]) -> bool:
    """Return whether most values are running text or token ids, rather than labels, names, marks or masks."""
    given = [value for value in values if value is not None]
    if not given:
        return not values
    likely = 0
    for value in given:
        match kind, value:
            case "text", str():
                # scripts without spaces have few words; paths, addresses and digests are long and hold one
                likely += len(value.split()) >= 5 or sum(not one.isascii() for one in value) >= 20
            case "tokens", list():
                likely += len(value) >= 8 and all(type(one) is int and one >= 0 for one in value) and max(value) > 1
            case _:
                likely += kind not in ("text", "tokens")
    return 2 * likely > len(given)


def read_row(row: Row, column: Column) -> str | list[int] | Conversation | BadRow:
    """Return the text, the token ids or the conversation that a row holds, or why it holds none."""
    if isinstance(row, BadRow):
        return row
    value = row.get(column.name)
    if column.kind == "chat":
        return _read_messages(value, column.name)
    if column.kind == "text" and isinstance(value, str):
        return value if value.isascii() else _check_text(value)
    if column.kind == "tokens" and isinstance(value, list) and all(type(token) is int for token in value):
        return _mask_ids(value, row, column) if column.masks else value
    wanted = "text" if column.kind == "text" else "a list of whole numbers"
    return BadRow(f"holds {_show(value)} in column {column.name!r}, wanted {wanted}")


def _read_messages(value: Any, name: str) -> Conversation | BadRow:
    """Return the messages of a conversation as chat templates want them."""
    if not isinstance(value, list) or not value:
        return BadRow(f"holds {_show(value)} in column {name!r}, wanted a conversation")
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        keys = next((keys for keys in _CHAT_KEYS if _is_message(item, keys)), None)
        if keys is None:
            return BadRow(f"holds {item!r:.60} as message {number} in column {name!r}, wanted a role and a content")
        who, said = item[keys[0]], item[keys[1]]
        if not isinstance(who, str) or not (isinstance(said, str) or (said is None and item.get("tool_calls"))):
            return BadRow(f"holds {item!r:.60} as message {number} in column {name!r}, wanted a role and a text")
        if isinstance(said, str) and isinstance(checked := _check_text(said), BadRow):
            return checked
        # `datasets` gives each message every key that another one has, as nothing
        others = {key: one for key, one in item.items() if key not in keys and one is not None}
        messages.append({"role": _ROLES.get(who, who) if keys[0] == "from" else who, "content": said, **others})
    return Conversation(messages)


def _mask_ids(ids: list[int], row: dict[str, Any], column: Column) -> list[int] | BadRow:
    """Return the ids that the row's masks call text: without padding, and without special tokens at either end."""
    masks = {name: row.get(name) for name in column.masks}
    n_text = masks.pop(LENGTH, len(ids))
    for name, mask in masks.items():
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(value in (0, 1) for value in mask):
            return BadRow(f"holds {len(ids)} ids and {_show(mask)} in column {name!r}, wanted 0 or 1 for each id")
    attended, special = (masks.get(name) for name in (ATTENTION_MASK, SPECIAL_TOKENS_MASK))
    kept = [at for at in range(len(ids)) if attended is None or attended[at]]
    if n_text != len(ids):
        padding = column.padding
        if type(n_text) is not int or not 0 <= n_text < len(ids) or not padding or not _pads(padding, ids, n_text):
            return BadRow(
                f"holds {len(ids)} ids and {_show(n_text)} in column {LENGTH!r}, and it is not clear which of them are "
                f"text: wanted no padding, or the column {ATTENTION_MASK!r}"
            )
        kept = kept[len(ids) - n_text :] if padding.is_left else kept[:n_text]
    if special is not None:
        ordinary = [number for number, at in enumerate(kept) if not special[at]]
        kept = kept[ordinary[0] : ordinary[-1] + 1] if ordinary else []
    return [ids[at] for at in kept]


def _check_text(text: str) -> str | BadRow:
    """Return the text, or say that it holds half of a UTF-16 pair, which JSON can spell and which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow(f"holds half a character ({text[error.start]!a} at {error.start}), wanted text")
    return text


def _show(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, list) and any(type(item) is not int for item in value):
        wrong = next(item for item in value if type(item) is not int)
        return f"a list with {wrong!r:.60}"
    return f"{value!r:.60}"
