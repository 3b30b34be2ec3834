"""Text to token ids and back, with no token added: packing puts BOS and separators where they belong.

A tokenizer called the usual way adds BOS by itself in some families and not in others, and TransformerLens reloads
it so that it always does. This one never does.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tailrace.pipeline.model.loading import Checkpoint, quiet, read_checkpoint_json, refuse_own_class
from tailrace.storage.artifact import JSON, digest
from tailrace.storage.errors import ModelError, TextError
from tailrace.storage.token_text import text_of_bytes

logger = logging.getLogger(__name__)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_LETTERS = ("\ue000", "\ue001")  # of private use: in no token, and nothing to any decoder
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ {'%d %b %Y': '01 Jan 2025', '%d %B %Y': '01 January 2025'}.get(format, "
    "'2025-01-01') }}{% endmacro %}"
)
"""Begins templates that write today's date, so that the same conversation is the same text on any day."""
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # code points that are no characters
_BATCH_STATE = ("truncation", "padding")  # set by the last call of a tokenizer, no part of what it is


class SpecialToken(NamedTuple):
    """A token id and where it came from: ``bos`` or ``eos`` of the tokenizer, ``config`` or ``setting``."""

    token_id: int
    source: str


class ChatTokens(NamedTuple):
    """A conversation as token ids, and which of them are in no message by the roles asked for; None for all roles."""

    ids: list[int]
    left_out: list[bool] | None = None


class StatedTokens(NamedTuple):
    """Token ids that a checkpoint's configuration states, whatever its tokenizer says."""

    start: int | None = None
    ends: tuple[int, ...] = ()


NOTHING_STATED = StatedTokens()


class ModelTokenizer:
    """A checkpoint's tokenizer, its beginning-of-context token and its separator between documents."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        name: str,
        d_vocab: int,
        bos_token_id: int | None = None,
        reads_text: bool = True,
        stated: StatedTokens = NOTHING_STATED,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        """``recorded`` is the identity of a tokenizer: of the same one, its BOS and separator are taken."""
        self._tokenizer = tokenizer
        self._name = name
        self._reads_text = reads_text
        self._d_vocab = d_vocab
        if recorded and recorded.get("digest") == self._digest():
            self.bos = SpecialToken(recorded["bos_token_id"], recorded["bos_source"])
            self.separator = SpecialToken(recorded["separator_token_id"], recorded["separator_source"])
        else:
            self.bos, self.separator = _choose_tokens(tokenizer, name, bos_token_id, stated)
        outside = {token.token_id for token in (self.bos, self.separator) if not 0 <= token.token_id < d_vocab}
        if outside:
            raise ModelError(
                f"model {name}: special token ids {sorted(outside)} lie outside its vocabulary, 0 to {d_vocab - 1}; "
                "the tokenizer belongs to another model, or --bos-token-id is wrong"
            )
        self._warn_of_unembedded(name)

    def _warn_of_unembedded(self, name: str) -> None:
        """Say which tokens the tokenizer can make for which the model has no embedding."""
        unembedded = {token: number for token, number in self._tokenizer.get_vocab().items() if number >= self._d_vocab}
        if unembedded:
            first = min(unembedded, key=unembedded.__getitem__)
            logger.warning(
                "model %s: its tokenizer makes %s that it has no embedding for, %r (id %d) first; its ids are 0 to %d, "
                "and a text in which such a token is read is refused",
                *(name, f"{len(unembedded):,} token{'s' * (len(unembedded) > 1)}", first, unembedded[first]),
                self._d_vocab - 1,
            )

    def tokenize(self, texts: Sequence[str], *, is_markup: bool = True) -> list[list[int]]:
        """Return the token ids of each text; no special token is added and nothing is cut.

        ``is_markup``: the name of a special token in a text, such as ``</s>``, is that token; else it is letters.
        """
        if not texts:
            return []
        if not self._reads_text:
            raise ModelError(
                f"model {self._name}: has no tokenizer (tokenizer.json), so it reads token ids only; put its tokenizer "
                "beside the weights, or give text as token ids"
            )
        # verbose=False: a text longer than a context is cut by packing, so the warning about it would be wrong.
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, truncation=False, padding=False,
            return_attention_mask=False, return_token_type_ids=False, verbose=False, split_special_tokens=not is_markup,
        )  # fmt: skip
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def tokenize_chat(
        self, messages: list[dict[str, Any]], *, is_markup: bool, roles: Collection[str] = ()
    ) -> ChatTokens:
        """Return the tokens of a conversation, written by the chat template.

        Raises TextError if the template refuses it, or if ``roles`` are asked for and cannot be told apart in it.
        """
        options = {} if is_markup else {"sanitize_control_tokens": True}
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, return_dict=False, **options
            )
            return ChatTokens(ids, self._left_out(messages, ids, roles) if roles else None)
        except (ModelError, TextError):
            raise
        except Exception as error:  # a template is a program, and fails in its own ways
            raise TextError(str(error) or type(error).__name__) from error

    def _left_out(self, messages: list[dict[str, Any]], ids: list[int], roles: Collection[str]) -> list[bool]:
        """Return which of a conversation's ``ids`` have no character of what ``roles`` say in it.

        The template writes the conversation a second time, with a mark at both ends of what they say.
        """
        if not self._tokenizer.is_fast:
            raise ModelError(
                f"model {self._name}: its tokenizer does not say where in a text its tokens lie, so rows cannot be "
                "chosen by role; leave --roles out, or put its tokenizer.json beside the weights"
            )
        text = self._write_chat(messages)
        opening, closing = [letter for letter in _MARKS if letter not in text][:2]
        marked = [
            {**one, "content": _wrap(one["content"], opening, closing)} if one["role"] in roles else one
            for one in messages
        ]
        pieces = re.split(f"([{opening}{closing}])", self._write_chat(marked))
        if "".join(pieces[::2]) != text or pieces[1::2] != [opening, closing] * (len(pieces) // 4):
            raise TextError("the template cuts or changes what messages say, so no token can be told apart by role")
        said = np.repeat(np.arange(len(pieces[::2])) % 2 == 1, [len(piece) for piece in pieces[::2]])
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, split_special_tokens=False
        )
        again: list[int] = []
        left_out: list[bool] = []
        for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # the name of a special token in a message is letters
            as_it_is = ids[len(again) : len(again) + 1] == [number]
            own = [number] if as_it_is else self.tokenize([text[start:stop]], is_markup=False)[0]
            again += own
            # some tokenizers do not count the spaces of a token, and a token of spaces is then empty
            left_out += [not said[start : max(stop, start + 1)].any()] * len(own)
        if again != ids:
            raise TextError("no token can be told apart by role where a message spells the name of a special token")
        return left_out

    def _write_chat(self, messages: list[dict[str, Any]]) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False)
        return text

    @property
    def chat_template(self) -> str:
        """The template that writes conversations; raises ModelError if there is none."""
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"model {self._name}: its tokenizer has no chat template to write conversations by; use a chat model, "
                "put chat_template.jinja beside the weights, or pass --column to read another column"
            ) from error
        return _FIXED_DATE + template if "strftime_now" in template else template

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Every token the tokenizer calls special, the BOS and the separator among them."""
        return tuple(sorted({*self._tokenizer.all_special_ids, self.bos.token_id, self.separator.token_id}))

    def vocabulary(self) -> list[str]:
        """Return each token id's text, for every id the model has.

        Bytes that are no whole UTF-8 character are shown as ``<0xE6>`` (see tailrace.storage.token_text); an id without
        a token, as some models have to round their embedding up, as ``<unused 50300>``.
        """
        # A vocabulary may have holes, so its ids are asked for one by one; len() would be no bound of them.
        known = sorted({number for number in self._tokenizer.get_vocab().values() if number < self._d_vocab})
        raw: list[str] = self._tokenizer.convert_ids_to_tokens(known)
        named = {number: _show(token, text) for number, token, text in zip(known, raw, self._texts(raw), strict=True)}
        return [named.get(number, f"<unused {number}>") for number in range(self._d_vocab)]

    def _texts(self, raw: Sequence[str]) -> list[str]:
        """Return what each token adds to a text in which tokens come before and after it.

        Alone it might lose something: decoders take a space off the start of a text, or off its end. So each stands
        between two letters that no decoder changes.
        """
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None or not (joined := decoder.decode([*_LETTERS])).startswith(_LETTERS[0]):
            return [token.replace(_WORD_START, " ") for token in raw]
        before, after = _LETTERS[0], joined.removeprefix(_LETTERS[0])
        decoded = (decoder.decode([_LETTERS[0], token, _LETTERS[1]]) for token in raw)
        return [text.removeprefix(before).removesuffix(after) for text in decoded]

    def identity(self) -> dict[str, JSON]:
        """Return what decides the tokens: a digest of the tokenizer, and the special tokens with their origin."""
        return {
            "digest": self._digest(),
            "n_tokens": len(self._tokenizer),
            "bos_token_id": self.bos.token_id,
            "bos_source": self.bos.source,
            "separator_token_id": self.separator.token_id,
            "separator_source": self.separator.source,
        }

    def _digest(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return digest(self._tokenizer.get_vocab())
        content = json.loads(backend.to_str())
        return digest({key: value for key, value in content.items() if key not in _BATCH_STATE})


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the transformers tokenizer that lies beside a checkpoint's weights; raise ModelError if it is unusable."""
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(checkpoint.name, revision=checkpoint.revision, trust_remote_code=False)
        except Exception as error:  # of a broken file, its readers raise whatever it leads them to
            _refuse_own_tokenizer(checkpoint)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(
                f"model {checkpoint.name}: its tokenizer cannot be opened: {reason}; "
                "a whole tokenizer.json (or the files of a slow tokenizer) must lie beside the weights"
            ) from error


def number_tokens(checkpoint: Checkpoint) -> Any:
    """Return a tokenizer that only names the ids of a checkpoint without one: ``<17>``, with its BOS and EOS."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    config = checkpoint.config.get_text_config()
    names = [f"<{number}>" for number in range(config.vocab_size)]
    chosen = {}
    for role in ("bos", "eos"):
        number = getattr(config, f"{role}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number  # of several, the first is the text's
        if isinstance(number, int):
            chosen[f"{role}_token"] = names[number]
    words: Any = WordLevel(vocab={name: number for number, name in enumerate(names)}, unk_token=names[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **chosen)


def _refuse_own_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise ModelError if only the checkpoint has the class of its tokenizer."""
    from transformers import TOKENIZER_MAPPING

    if type(checkpoint.config) not in TOKENIZER_MAPPING:
        written = read_checkpoint_json(checkpoint.name, "tokenizer_config.json", checkpoint.revision)
        refuse_own_class(checkpoint.name, "tokenizer_config.json", written.get("auto_map"), "AutoTokenizer")


def read_stated_tokens(checkpoint: Checkpoint) -> StatedTokens:
    """Return what a checkpoint's configuration calls BOS and EOS. A class's defaults count for nothing."""
    config, generation = (
        read_checkpoint_json(checkpoint.name, file, checkpoint.revision)
        for file in ("config.json", "generation_config.json")
    )
    texts = [one for one in (config.get("text_config"), config) if isinstance(one, dict)]
    starts = [one["bos_token_id"] for one in texts if isinstance(one.get("bos_token_id"), int)]
    ends = [one.get("eos_token_id") for one in (*texts, generation)]
    flat = [number for one in ends for number in (one if isinstance(one, list) else [one])]
    return StatedTokens(starts[0] if starts else None, tuple(number for number in flat if isinstance(number, int)))


def _choose_tokens(
    tokenizer: Any, name: str, wanted: int | None, stated: StatedTokens
) -> tuple[SpecialToken, SpecialToken]:
    """Return what begins contexts and what ends documents.

    The EOS of a chat model's tokenizer may be the end of a turn, which no text between documents has: the template
    writes it out, where an end of texts is called by its name, ``eos_token``. The configuration then has another.
    """
    special = {*tokenizer.all_special_ids, *(one for one, token in _added(tokenizer) if token.special)}
    own, eos = (getattr(tokenizer, f"{source}_token_id", None) for source in ("bos", "eos"))
    start = stated.start if own is None and stated.start in special and stated.start != eos else None
    known = {"setting": wanted, "bos": own, "config": start, "eos": eos}
    bos = next((SpecialToken(int(number), source) for source, number in known.items() if number is not None), None)
    if bos is None:
        raise ModelError(
            f"model {name}: its tokenizer has neither a BOS nor an EOS token to begin a context with; "
            "choose one of its token ids with --bos-token-id"
        )
    if eos is None:
        return bos, bos
    if start is not None:
        return bos, SpecialToken(start, "config")
    template = str(getattr(tokenizer, "chat_template", None) or "")
    is_turn = {number: tokenizer.convert_ids_to_tokens(number) in template for number in special}
    if is_turn.get(eos, False):
        for number in stated.ends:
            if not is_turn.get(number, True):
                return bos, SpecialToken(number, "config")
        logger.warning(
            "model %s: its EOS %r ends a turn of its chat template, and its configuration names no other end of a "
            "text: it is put between documents%s",
            *(name, tokenizer.eos_token),
            " and before contexts; --bos-token-id chooses another there" if bos.token_id == eos else "",
        )
    return bos, SpecialToken(int(eos), "eos")


def _added(tokenizer: Any) -> Any:
    return getattr(tokenizer, "added_tokens_decoder", {}).items()


def _wrap(content: str | None, opening: str, closing: str) -> str | None:
    """Return a message's content between marks, but for the space around it, which templates take off."""
    if content is None or not (stripped := content.strip()):
        return content
    before, after = content.split(stripped, 1)
    return f"{before}{opening}{stripped}{closing}{after}"


def _show(raw: str, text: str) -> str:
    """Return a token's text with the bytes named that are no whole character; its own name if it adds no text."""
    return _partial(raw, text) if _REPLACEMENT in text else text or raw


def _partial(raw: str, text: str) -> str:
    """Return a token that is no whole text with its bytes named, if they can be told from its own letters."""
    codes = [_byte_letters().get(letter) for letter in raw]
    data = bytes(code for code in codes if code is not None)
    # SentencePiece's byte tokens have their names already; a token may also be the replacement character itself.
    is_known = len(data) == len(raw) and data.decode("utf-8", "replace") == text
    return text_of_bytes(data) if is_known else raw


@cache
def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter stands for in the alphabet of byte-level tokenizers (GPT-2's)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
