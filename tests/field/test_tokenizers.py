"""Tokens as they are shown: what a tokenizer's own decoding makes of them, for every tokenizer that can be built."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.tokenizer import ModelTokenizer, StatedTokens
from tailrace.storage.token_text import has_bytes, join_characters
from tests.support.tiny_models import save_tiny_model

EOS, UNKNOWN = "<eos>", "<unk>"


def opened(tokenizer, d_vocab, **special):
    names = {"eos_token": EOS, "unk_token": UNKNOWN, **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return fast, ModelTokenizer(fast, name="made", d_vocab=d_vocab)


def llama_tokenizer(pieces, merges):
    """Return a tokenizer of Llama 2's making: spaces written as ▁, one put in front, bytes as last resort."""
    tokens = [UNKNOWN, "<s>", EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, len(tokens)


# SentencePiece's spaces (case 12)


def test_token_of_llama_has_as_many_spaces_as_its_piece():
    spaces = ["▁", "▁▁", "▁▁▁▁"]
    pieces = [*spaces, "r", "e", "re", "▁re", "▁▁▁▁re", "\n"]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("r", "e"), ("▁", "re"), ("▁▁▁▁", "re")]
    tokenizer, n_tokens = llama_tokenizer(pieces, merges)
    fast, model = opened(tokenizer, n_tokens)
    shown = model.vocabulary()
    assert shown[-len(pieces) :] == [" ", "  ", "    ", "r", "e", "re", " re", "    re", "\n"]
    assert shown[:3] == [UNKNOWN, "<s>", EOS]
    assert (shown[3 + 0x41], shown[3 + 0xE6]) == ("A", "<0xE6>")
    code = "re\n        re 日"
    (ids,) = model.tokenize([code])
    assert "".join(join_characters([shown[one] for one in ids])) == f" {code}"
    assert fast.decode(ids) == code


# Holes in a vocabulary (case 18)


def test_tokens_behind_a_hole_are_shown_and_only_holes_are_unused():
    words = {UNKNOWN: 0, EOS: 1, "the": 2, "law": 3, "of": 7, "land": 9}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shown = opened(tokenizer, 12)[1].vocabulary()
    expected = {number: word for word, number in words.items()}
    assert shown == [expected.get(number, f"<unused {number}>") for number in range(12)]


# The end of a turn is no end of a text (case 19)

CHATML = "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n'}}{% endfor %}"
NAMED_EOS = "{% for m in messages %}[INST] {{ m.content }}{{ eos_token }}{% endfor %}"
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>")


def chosen(stated, template=None, **special):
    tokens = [*CHAT_TOKENS, UNKNOWN, "the", "law"]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN))
    names = {"pad_token": "<|endoftext|>", "additional_special_tokens": list(CHAT_TOKENS), **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, chat_template=template, **names)
    model = ModelTokenizer(fast, name="made", d_vocab=len(tokens), stated=StatedTokens(*stated))
    return tuple((tokens[one.token_id], one.source) for one in (model.bos, model.separator)), model


QWEN = {"eos_token": "<|im_end|>"}
LLAMA = {"bos_token": "<bos>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("stated", "template", "special", "bos", "separator"),
    [
        # Qwen's chat models: the configuration's BOS at both ends
        ((0, (2,)), None, QWEN, ("<|endoftext|>", "config"), ("<|endoftext|>", "config")),
        ((0, (2, 0)), CHATML, QWEN, ("<|endoftext|>", "config"), ("<|endoftext|>", "config")),
        # a configuration's BOS that is a word, or the EOS
        ((5, (2,)), None, QWEN, ("<|im_end|>", "eos"), ("<|im_end|>", "eos")),
        ((2, (2,)), None, QWEN, ("<|im_end|>", "eos"), ("<|im_end|>", "eos")),
        # Llama 3 Instruct: the configuration lists the end of a text among others
        ((3, (2, 0)), CHATML, LLAMA, ("<bos>", "bos"), ("<|endoftext|>", "config")),
        ((3, (1, 2)), CHATML, LLAMA, ("<bos>", "bos"), ("<|im_end|>", "eos")),
        # an EOS that ends texts, in a model that chats or not
        ((3, (2, 0)), NAMED_EOS, LLAMA, ("<bos>", "bos"), ("<|im_end|>", "eos")),
        ((3, (2, 0)), None, LLAMA, ("<bos>", "bos"), ("<|im_end|>", "eos")),
    ],
)
def test_contexts_begin_and_documents_end_with_what_texts_have(caplog, stated, template, special, bos, separator):
    found, model = chosen(stated, template, **special)
    assert found == (bos, separator)
    ends_turn = separator == ("<|im_end|>", "eos") and template is CHATML
    assert ("ends a turn of its chat template" in caplog.text) == ends_turn
    recorded = {**model.identity(), "bos_token_id": 1, "separator_token_id": 2}
    fast = model._tokenizer
    again = ModelTokenizer(fast, name="made", d_vocab=7, stated=StatedTokens(*stated), recorded=recorded)
    assert (again.bos.token_id, again.separator.token_id) == (1, 2)
    other = ModelTokenizer(fast, name="made", d_vocab=7, stated=StatedTokens(*stated), recorded={"digest": "other"})
    assert (other.bos, other.separator) == (model.bos, model.separator)


def test_qwen_chat_model_begins_contexts_as_its_configuration_says(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama", eos_token="<|im_end|>", bos_token="<|endoftext|>")
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    named = json.loads((folder / "tokenizer_config.json").read_text())
    named["pad_token"] = named.pop("bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    model = load_language_model(ModelSettings(model=str(folder)))
    assert model.bos_token_id == model.separator_token_id == tokens["<|endoftext|>"]
    assert model.identity()["tokenizer"]["bos_source"] == "config"


# Every tokenizer that can be built

LETTERS = st.sampled_from("ab é日\n.' ")
TEXTS = st.text(LETTERS, max_size=16)
SPECIAL = [UNKNOWN, EOS]


def byte_level(draw):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )


def word_ends(draw):
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer, trainers.BpeTrainer(
        vocab_size=40, end_of_word_suffix="</w>", special_tokens=SPECIAL, show_progress=False
    )


def unigram(draw):
    scheme = draw(st.sampled_from(["always", "first", "never"]))
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=40, unk_token=UNKNOWN, special_tokens=SPECIAL, show_progress=False
    )


def word_piece(draw):
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=draw(st.booleans()))
    return tokenizer, trainers.WordPieceTrainer(vocab_size=40, special_tokens=SPECIAL, show_progress=False)


def word_level(draw):
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordLevelTrainer(vocab_size=20, special_tokens=SPECIAL, show_progress=False)


def sentence_piece(draw):
    tokenizer, _ = llama_tokenizer([], [])
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )


KINDS = (byte_level, word_ends, unigram, word_piece, word_level, sentence_piece)


@st.composite
def tokenizers(draw):
    """A tokenizer of some kind, trained on some texts, with added tokens and with holes among its ids."""
    tokenizer, trainer = draw(st.sampled_from(KINDS))(draw)
    tokenizer.train_from_iterator([*draw(st.lists(TEXTS, max_size=4)), "ab a b ba"], trainer)
    tokenizer.add_tokens(draw(st.lists(st.sampled_from(["<a b>", "bab", "[x]"]), max_size=2, unique=True)))
    content = json.loads(tokenizer.to_str())
    step, vocabulary = draw(st.integers(1, 3)), content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {token: step * number for token, number in vocabulary.items()}
        for token in content["added_tokens"]:
            token["id"] = content["model"]["vocab"].get(token["content"], step * token["id"])
    return Tokenizer.from_str(json.dumps(content))


@given(tokenizer=tokenizers(), text=TEXTS, unembedded=st.integers(-2, 3))
def test_tokens_as_shown_join_to_the_tokenizers_own_decoding(tokenizer, text, unembedded):
    ids_of = tokenizer.get_vocab()
    d_vocab = max(ids_of.values()) + 1 + unembedded
    fast, model = opened(tokenizer, d_vocab)
    shown = model.vocabulary()
    assert len(shown) == d_vocab
    known = set(ids_of.values())
    assert all((f"<unused {number}>" == token) == (number not in known) for number, token in enumerate(shown))
    (ids,) = model.tokenize([text])
    assume(all(number < d_vocab for number in ids))
    own = fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = join_characters([shown[number] for number in ids])
    joined = (" " if tokenizer.decoder is None else "").join(texts)
    assert not any(map(has_bytes, texts))
    # a decoder may take spaces off the start or the end of what it is given
    assert own in joined
    assert joined.replace(own, "", 1).strip(" ") == ""
