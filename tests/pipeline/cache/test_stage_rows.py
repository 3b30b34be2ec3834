"""Stored rows are what the model's modules see and say, at the tokens they claim to be, as many as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import zarr

from tailrace.pipeline.cache import plan, stage
from tailrace.pipeline.cache.plan import choose_rows, context_format
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import ActivationCache, CacheSplit, open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.formats import Compression
from tailrace.storage.layout import RELATIVE_ERROR, array_metadata
from tailrace.storage.memory import aligned_rows
from tailrace.storage.statistics import as_float32
from tests.support.cache_jobs import (
    CONTEXT_LENGTH,
    differing,
    full_forward,
    model_folder,
    plain_forward,
    run_cache,
    settings,
    speech_texts,
    tree,
)
from tests.support.quick import quick

PROVENANCE = ["token_id", "context", "position", "document"]
PLAIN = {"layer0/in": "h.0.mlp/in", "layer0/out": "h.0.mlp/out", "layer1/in": "h.1.mlp/in", "layer1/out": "h.1.mlp/out"}


def rows_of(split: CacheSplit, keys: list[str]) -> dict[str, np.ndarray]:
    """Return all rows of a split in token order."""
    units = [split.read_unit(unit, keys) for unit in range(split.n_units)]
    return {key: np.concatenate([unit[key] for unit in units]) for key in keys}


def contexts_of(split: CacheSplit) -> np.ndarray:
    return split.context_tokens(np.arange(split.n_contexts))


def taken(split: CacheSplit, computed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return activations (contexts, positions, d) at the places that the rows of a split name."""
    rows = rows_of(split, ["context", "position"])
    return {
        name: values[rows["context"].astype(int), rows["position"].astype(int)] for name, values in computed.items()
    }


def expected_at(split: CacheSplit, hook: str) -> np.ndarray:
    return taken(split, full_forward(contexts_of(split), [hook]))[hook]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return run_cache(tmp_path_factory.mktemp("cache") / "cache", layers="all").cache


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_stored_rows_equal_a_full_forward_over_the_recorded_contexts(cache: ActivationCache, split: str) -> None:
    hooks = {key: f"blocks.{key[5]}.mlp.hook_{key[7:]}" for key in PLAIN}
    stored = rows_of(cache.split(split), list(PLAIN))
    expected = taken(cache.split(split), full_forward(contexts_of(cache.split(split)), list(hooks.values())))
    for key, hook in hooks.items():
        assert np.array_equal(stored[key], expected[hook]), key


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_stored_rows_are_what_the_modules_of_transformers_see_and_say(cache: ActivationCache, split: str) -> None:
    stored = rows_of(cache.split(split), list(PLAIN))
    expected = taken(cache.split(split), plain_forward(contexts_of(cache.split(split)), list(PLAIN.values())))
    for key, module in PLAIN.items():
        np.testing.assert_allclose(stored[key], expected[module], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_row_names_its_token_its_place_and_its_document(cache: ActivationCache, split: str) -> None:
    rows, contexts = rows_of(cache.split(split), PROVENANCE), contexts_of(cache.split(split))
    context, position = rows["context"].astype(int), rows["position"].astype(int)
    n_rows = cache.split(split).n_rows
    assert np.array_equal(context, np.arange(n_rows) // 15)  # 15 rows per context of 16: all but the BOS
    assert np.array_equal(position, np.arange(n_rows) % 15 + 1)
    assert np.array_equal(rows["token_id"], contexts[context, position])
    documents = cache.split(split).context_documents(np.arange(len(contexts)))
    assert np.array_equal(rows["document"], documents[context, position])


def test_tokens_of_a_document_are_its_own_text_in_order(cache: ActivationCache) -> None:
    vocabulary = cache.vocabulary()
    rows = rows_of(cache.split("train"), PROVENANCE)
    document = int(rows["document"][0])
    found = [vocabulary[token] for token in rows["token_id"][rows["document"] == document].tolist()]
    words = speech_texts()[document].split()
    known = set(vocabulary)
    assert len(found) > 100
    assert found[:100] == [word if word in known else "<unk>" for word in words[:100]]


def test_documents_of_the_two_splits_have_nothing_in_common(cache: ActivationCache) -> None:
    documents = [set(rows_of(cache.split(split), ["document"])["document"].tolist()) for split in ("train", "heldout")]
    assert documents[0]
    assert documents[1]
    assert not documents[0] & documents[1]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 320])
def test_there_are_exactly_as_many_training_rows_as_asked_for(tmp_path: Path, tokens: int) -> None:
    cache = run_cache(tmp_path / "cache", tokens=tokens).cache
    rows = rows_of(cache.split("train"), ["context", "position"])
    assert cache.split("train").n_rows == tokens == len(rows["context"])
    assert cache.split("train").statistics("layer0", "in").n_rows == tokens


def test_bos_is_left_out_by_default_and_kept_if_asked_for(cache: ActivationCache, tmp_path: Path) -> None:
    assert set(rows_of(cache.split("train"), ["position"])["position"].tolist()) == set(range(1, CONTEXT_LENGTH))
    kept = run_cache(tmp_path / "none", exclude="none").cache.split("train")
    rows = rows_of(kept, PROVENANCE)
    assert rows["position"][:17].tolist() == [*range(16), 0]
    assert set(rows["token_id"][rows["position"] == 0].tolist()) == {1}  # <eos>, which begins contexts here
    late = run_cache(tmp_path / "late", first_position=10, tokens=300).cache.split("train")
    assert set(rows_of(late, ["position"])["position"].tolist()) == set(range(10, CONTEXT_LENGTH))


def test_special_tokens_are_left_out_on_request(tmp_path: Path) -> None:
    split = run_cache(tmp_path / "cache", exclude="special").cache.split("train")
    token_ids = rows_of(split, ["token_id"])["token_id"]
    assert set(token_ids.tolist()) & {0, 1} == set()  # <unk>, <eos>
    tokens = contexts_of(split)
    assert len(token_ids) == 500 <= int((tokens > 1).sum())  # <unk> is common in this text
    assert np.array_equal(token_ids, tokens[tokens > 1][:500])


def test_one_hook_makes_a_site_for_an_sae_with_one_side(tmp_path: Path) -> None:
    cache = run_cache(tmp_path / "cache", layers=None, hooks=["blocks.0.mlp.hook_out"]).cache
    (site,) = cache.sites.values()
    assert (site.hook_in, site.hook_out, site.sides) == ("blocks.0.mlp.hook_out", "blocks.0.mlp.hook_out", ("in",))
    stored = rows_of(cache.split("train"), [f"{site.name}/in", f"{site.name}/out"])
    expected = expected_at(cache.split("train"), "blocks.0.mlp.hook_out")
    assert np.array_equal(stored[f"{site.name}/in"], expected)
    assert np.array_equal(stored[f"{site.name}/out"], expected)


def test_attention_heads_are_stored_side_by_side(tmp_path: Path) -> None:
    cache = run_cache(tmp_path / "cache", layers=None, hooks=["z=blocks.1.attn.hook_z"]).cache
    stored = rows_of(cache.split("train"), ["z/in"])["z/in"]
    assert stored.shape == (500, 16)  # four heads of four
    assert np.array_equal(stored, expected_at(cache.split("train"), "blocks.1.attn.hook_z"))
    projected = taken(cache.split("train"), plain_forward(contexts_of(cache.split("train")), ["h.1.attn.c_proj/in"]))
    np.testing.assert_allclose(stored, projected["h.1.attn.c_proj/in"], rtol=1e-5, atol=1e-5)


def test_a_pair_of_any_two_hooks_is_stored_as_named(tmp_path: Path) -> None:
    cache = run_cache(tmp_path / "cache", layers="0", hooks=["skip=blocks.0.mlp.hook_in:blocks.1.mlp.hook_out"]).cache
    assert list(cache.sites) == ["layer0", "skip"]
    stored = rows_of(cache.split("train"), ["skip/in", "skip/out"])
    assert np.array_equal(stored["skip/in"], expected_at(cache.split("train"), "blocks.0.mlp.hook_in"))
    assert np.array_equal(stored["skip/out"], expected_at(cache.split("train"), "blocks.1.mlp.hook_out"))


@pytest.mark.parametrize("compression", quick([name for name in get_args(Compression) if name != "none"], "zstd"))
def test_compressed_rows_are_the_same_rows(cache: ActivationCache, tmp_path: Path, compression: str) -> None:
    packed = run_cache(tmp_path / "cache", layers="all", compression=compression).cache
    keys = [*PLAIN, *PROVENANCE]
    for split in ("train", "heldout"):
        found, expected = rows_of(packed.split(split), keys), rows_of(cache.split(split), keys)
        assert all(np.array_equal(found[key], expected[key]) for key in keys)
    assert verify_bytes(tmp_path / "cache") == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rows_stored_in_fewer_bits_are_the_rows_rounded(cache: ActivationCache, tmp_path: Path, dtype: str) -> None:
    rounded = run_cache(tmp_path / "cache", layers="all", storage_dtype=dtype).cache.split("train")
    exact = rows_of(cache.split("train"), list(PLAIN))
    for key, stored in rows_of(rounded, list(PLAIN)).items():
        error = np.linalg.norm(as_float32(stored) - exact[key], axis=1) / np.linalg.norm(exact[key], axis=1)
        assert 0 < error.max() <= RELATIVE_ERROR[dtype], key
        if dtype == "bfloat16":
            assert np.array_equal(stored, torch.from_numpy(exact[key]).bfloat16().view(torch.uint16).numpy())
        if dtype == "float16":
            assert np.array_equal(stored, exact[key].astype(np.float16))
        if dtype == "int8":
            unexplained = ((stored - exact[key]) ** 2).sum() / ((exact[key] - exact[key].mean(0)) ** 2).sum()
            assert unexplained < 2e-3  # 1e-4 for real models: here a scale is a mean over 60 rows, a row is 16 numbers


def test_the_same_settings_give_the_same_bytes_and_another_seed_another_order(
    cache: ActivationCache, tmp_path: Path
) -> None:
    run_cache(tmp_path / "again", layers="all")
    assert differing(tree(tmp_path / "again"), tree(cache.path)) == []
    other = run_cache(tmp_path / "other", layers="all", seed=1).cache
    assert differing(tree(other.path), tree(cache.path)) != []


def test_nothing_published_names_the_place_of_the_cache_or_the_hour(cache: ActivationCache) -> None:
    import time

    year = time.strftime("%Y-").encode()
    for name, data in tree(cache.path).items():
        if name.endswith(".json"):
            assert str(cache.path).encode() not in data, name
            assert year not in data, name


def test_rows_of_the_last_grid_batch_do_not_depend_on_what_follows_it(cache: ActivationCache, tmp_path: Path) -> None:
    # 10 rows end in the first context of a batch of 4: the other 3 are padding or, in the larger cache, real contexts
    short = run_cache(tmp_path / "cache", tokens=10).cache.split("train")
    assert short.n_contexts == 1
    longer = rows_of(run_cache(tmp_path / "longer", tokens=50, holdout="0").cache.split("train"), ["layer0/in"])
    alone = rows_of(run_cache(tmp_path / "alone", tokens=10, holdout="0").cache.split("train"), ["layer0/in"])
    assert np.array_equal(alone["layer0/in"], longer["layer0/in"][:10])


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the bytes of every buffer that holds rows of a unit."""
    sizes: list[int] = []

    def counted(n_rows: int, width: int | None, dtype: Any) -> np.ndarray:
        rows = aligned_rows(n_rows, width, dtype)
        if n_rows == 64:
            sizes.append(rows.nbytes)
        return rows

    monkeypatch.setattr("tailrace.storage.cache_writer.aligned_rows", counted)
    return sizes


def test_memory_is_two_units_however_many_rows_there_are(tmp_path: Path, allocated: list[int]) -> None:
    run_cache(tmp_path / "few", tokens=100)
    row_bytes = 2 * 16 * 4 + 4 + 4 + 2 + 4  # in and out of width 16 in float32; token, context, position, document
    assert sum(allocated) == 2 * 64 * row_bytes
    few = len(allocated)
    run_cache(tmp_path / "many", tokens=900)
    assert len(allocated) == 2 * few


def test_shards_and_chunks_are_chosen_to_fit_the_cache(tmp_path: Path) -> None:
    chosen = run_cache(tmp_path / "cache", shard_rows="auto", chunk_rows="auto").cache.layout
    assert (chosen.shard_rows, chosen.chunk_rows) == (4096, 4096)
    whole = CacheSettings.read(settings().model_dump(), {"shard_rows": "auto", "chunk_rows": "auto"})
    wide = Site("layer8", "a", "b", 768, 768, "bfloat16")
    assert choose_rows(whole, [wide], 60_000_000) == (262_144, 4096)
    assert choose_rows(whole, [wide] * 12, 60_000_000) == (16_384, 4096)  # a gibibyte of 36,864 bytes per row
    assert choose_rows(whole, [wide], 100_000) == (8192, 4096)  # eight units or more


def test_a_context_length_that_divides_nothing_is_cached_and_read(tmp_path: Path) -> None:
    chosen = settings(context_length=12)
    cache = stage.run(chosen, output=tmp_path / "cache", compute=Compute(threads=1, quiet=True)).cache
    assert (2**19 // 12, cache.layout.block_contexts) == (43_690, 43_776)  # the next multiple of 256
    assert verify_bytes(cache.path) == []
    split = cache.split("train")
    stored = zarr.open_group(cache.path / "train", mode="r")["contexts/tokens"]
    assert stored.shape == (split.n_contexts, 12)  # type: ignore[union-attr]
    assert np.array_equal(np.asarray(stored[...]), contexts_of(split))  # type: ignore[index]


@pytest.mark.parametrize(
    ("context_length", "contexts_per_batch", "block_contexts"),
    [(128, 32, 4096), (1024, 32, 512), (4096, 4, 128), (3000, 4, 174), (1000, 4, 768), (3000, 300, 512)],
)
def test_a_block_of_contexts_is_cut_into_equal_chunks(
    context_length: int, contexts_per_batch: int, block_contexts: int
) -> None:
    layout = context_format(settings(context_length=context_length, contexts_per_batch=contexts_per_batch))
    assert layout.block_contexts == block_contexts
    for spec in layout.context_specs():
        assert spec.chunks_per_shard * spec.chunk_rows == spec.shard_rows
        array_metadata(spec, 1, {})  # Zarr refuses other shapes


def test_what_an_earlier_release_began_in_blocks_of_broken_chunks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, here = settings(context_length=12), Compute(threads=1, quiet=True)
    with monkeypatch.context() as earlier:
        earlier.setattr(plan, "CHUNK_CONTEXTS", 1)
        with pytest.raises(ValueError, match=r"\(43690, 12\)\) needs to be divisible"):
            stage.run(chosen, output=tmp_path / "cache", compute=here)
    with pytest.raises(ArtifactMismatch, match="in blocks of 43,690 contexts, which it could not have finished"):
        stage.run(chosen, output=tmp_path / "cache", compute=here)


def test_a_prepared_model_of_another_family_with_a_bos_begins_contexts_with_it(tmp_path: Path) -> None:
    model = model_folder(family="llama", bos_token="<bos>")
    split = run_cache(tmp_path / "cache", model=str(model)).cache.split("train")
    assert set(contexts_of(split)[:, 0].tolist()) == {2}  # <unk>, <eos>, <bos>
    assert open_cache(tmp_path / "cache").vocabulary()[:3] == ["<unk>", "<eos>", "<bos>"]
