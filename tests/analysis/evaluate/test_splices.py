"""Scores of a model with transcoders in place: each is what a plain computation of the same thing gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tailrace.analysis.evaluate.evaluation import (
    ALL_SITES,
    ContextBatch,
    Evaluation,
    SplicedSite,
    TokenDeltas,
    token_rows,
)
from tailrace.analysis.evaluate.splice_scores import SpliceScore
from tailrace.analysis.splice.replacement import EVERY_POSITION, Substitute, Transcoded, ZeroAblated, replaced
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ModelError, NonFiniteActivation
from tests.support.spliced_models import (
    D_HEAD,
    N_LAYERS,
    TOKENS,
    WHERE,
    WIDTH,
    MlpItself,
    autoencoder_site,
    logits_with_module_hooks,
    mlp_site,
    plain_model,
    random_transcoder,
    tiny_model,
)

MEAN = np.linspace(-1, 1, WIDTH)
BATCH = ContextBatch(np.array([7, 4]), TOKENS, WHERE)


def evaluated(
    sites: list[SplicedSite], family: str = "gpt2", batches: list[ContextBatch] | None = None
) -> tuple[dict[str, SpliceScore], list[TokenDeltas]]:
    evaluation = Evaluation(tiny_model(family).bridge, {one.site.name: [one] for one in sites})
    deltas = [one for batch in batches or [BATCH] for one in evaluation.add(batch)]
    return evaluation.scores(), deltas


def losses(logits: Tensor) -> Tensor:
    """(contexts, positions − 1), float64, written as one expression."""
    flat = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    return flat.view(2, 9)


def keep_bos(changed: Tensor, output: Tensor) -> Tensor:
    return torch.where(WHERE[..., None], changed, output)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_every_cross_entropy_is_that_of_the_model_with_plain_module_hooks(family: str) -> None:
    transcoder, mean = random_transcoder(), torch.from_numpy(MEAN).float()
    scores, _ = evaluated([SplicedSite(mlp_site(1), transcoder, MEAN)], family)
    original = losses(logits_with_module_hooks(family, {}))
    expected = {
        "spliced": {".1.mlp": lambda _, inputs, output: keep_bos(transcoder(inputs[0]), output)},
        "zero": {".1.mlp": lambda _, inputs, output: keep_bos(torch.zeros(WIDTH), output)},
        "mean": {".1.mlp": lambda _, inputs, output: keep_bos(mean, output)},
    }
    score = scores["layer1"]
    assert score.ce_original == pytest.approx(original.mean().item(), abs=1e-5)
    assert (score.n_contexts, score.n_predictions) == (2, 18)
    p = logits_with_module_hooks(family, {})[:, :-1].double().log_softmax(-1)
    ce = {}
    for kind, hooks in expected.items():
        logits = logits_with_module_hooks(family, hooks)
        ce[kind] = losses(logits).mean().item()
        q = logits[:, :-1].double().log_softmax(-1)
        outcome = getattr(score, kind)
        assert outcome.ce == pytest.approx(ce[kind], abs=1e-5)
        assert outcome.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5)
    for kind, share in (("zero", score.ce_recovered), ("mean", score.ce_recovered_from_mean)):
        gap = ce[kind] - original.mean().item()
        assert share == (pytest.approx((ce[kind] - ce["spliced"]) / gap, abs=1e-3) if gap > 0 else None)


def test_the_mlp_itself_recovers_everything_and_explains_everything() -> None:
    sites = [SplicedSite(mlp_site(layer), MlpItself("llama", layer), MEAN) for layer in range(N_LAYERS)]
    scores, _ = evaluated(sites, "llama")
    assert list(scores) == ["layer0", "layer1", "layer2", ALL_SITES]
    assert any(score.ce_recovered is not None for score in scores.values())
    for score in scores.values():
        costs = score.zero.ce > score.ce_original
        assert score.ce_recovered == (pytest.approx(1, abs=1e-4) if costs else None)
        assert score.spliced.kl == pytest.approx(0, abs=1e-6)
        assert all(in_place.fvu == pytest.approx(0, abs=1e-9) for in_place in score.in_place.values())


def test_a_transcoder_of_nothing_is_zero_ablation_and_one_of_the_mean_is_mean_ablation() -> None:
    nothing = random_transcoder()
    for parameter in nothing.parameters():
        parameter.zero_()
    scores, _ = evaluated([SplicedSite(mlp_site(0), nothing, MEAN)])
    assert scores["layer0"].spliced == scores["layer0"].zero
    assert scores["layer0"].ce_recovered == 0
    assert scores["layer0"].in_place["layer0"].l0 == 0
    nothing.b_dec_out.copy_(torch.from_numpy(MEAN))
    scores, _ = evaluated([SplicedSite(mlp_site(0), nothing, MEAN)])
    assert scores["layer0"].spliced == scores["layer0"].mean
    assert scores["layer0"].ce_recovered_from_mean == 0


@pytest.mark.parametrize("skip", [False, True])
def test_fvu_and_l0_in_place_are_those_of_the_replaced_rows_against_the_mlps_output(skip: bool) -> None:
    transcoder = random_transcoder(skip=skip)
    scores, _ = evaluated([SplicedSite(mlp_site(2), transcoder, MEAN)])
    seen: list[Tensor] = []
    plain = plain_model("gpt2")
    plain.transformer.h[2].mlp.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    plain(TOKENS)
    inputs, outputs = seen[0][WHERE], seen[1][WHERE].double()
    error = (transcoder(inputs).double() - outputs).square().sum()
    in_place = scores["layer2"].in_place["layer2"]
    assert in_place.n_rows == 18
    assert in_place.fvu == pytest.approx((error / (outputs - outputs.mean(0)).square().sum()).item(), rel=1e-4)
    assert in_place.l0 == pytest.approx((transcoder.encode(inputs) > 0).sum(1).double().mean().item())


def test_all_sites_together_are_scored_on_the_stream_that_the_others_bent() -> None:
    sites = [SplicedSite(mlp_site(layer), random_transcoder(seed=layer), MEAN) for layer in (0, 2)]
    scores, _ = evaluated(sites)
    together = scores[ALL_SITES]
    assert together.sites == ("layer0", "layer2")
    spliced = {
        f".{layer}.mlp": lambda _, inputs, output, layer=layer: keep_bos(
            random_transcoder(seed=layer)(inputs[0]), output
        )
        for layer in (0, 2)
    }
    assert together.spliced.ce == pytest.approx(
        losses(logits_with_module_hooks("gpt2", spliced)).mean().item(), abs=1e-5
    )
    zero = {f".{layer}.mlp": lambda _, inputs, output: keep_bos(torch.zeros(WIDTH), output) for layer in (0, 2)}
    assert together.zero.ce == pytest.approx(losses(logits_with_module_hooks("gpt2", zero)).mean().item(), abs=1e-5)
    # layer 0 reads the same stream in both, layer 2 another one
    assert together.in_place["layer0"] == scores["layer0"].in_place["layer0"]
    assert together.in_place["layer2"] != scores["layer2"].in_place["layer2"]


def test_deltas_are_per_token_and_their_means_are_the_scores() -> None:
    # the reference documented losses per token and returned their mean, then subtracted a vector from it
    sites = [SplicedSite(mlp_site(layer), random_transcoder(seed=layer), MEAN) for layer in (0, 1)]
    scores, deltas = evaluated(sites)
    assert [one.sites for one in deltas] == ["layer0", "layer1", ALL_SITES]
    for one in deltas:
        rows = token_rows(one).to_pydict()
        assert rows["context"] == [7] * 9 + [4] * 9
        assert rows["position"] == list(range(9)) * 2
        assert rows["token_id"] == TOKENS[:, :-1].flatten().tolist()
        assert rows["next_token_id"] == TOKENS[:, 1:].flatten().tolist()
        assert rows["replaced"] == WHERE[:, :-1].flatten().tolist()
        assert rows["ce_original"] == pytest.approx(losses(logits_with_module_hooks("gpt2", {})).flatten(), abs=1e-4)
        score = scores[one.sites]
        assert np.mean(rows["ce_spliced"]) == pytest.approx(score.spliced.ce)
        assert np.mean(rows["kl"]) == pytest.approx(score.spliced.kl)
        assert np.mean(rows["delta"]) == pytest.approx(score.spliced.ce - score.ce_original)
        # nothing has been replaced where the first token of a context is predicted from its BOS
        assert [rows["delta"][0], rows["kl"][0], rows["delta"][9]] == [0, 0, 0]
        by_context = np.mean(np.reshape(rows["delta"], (2, 9)), axis=1)
        assert score.ce_increase_error == pytest.approx(abs(by_context[0] - by_context[1]) / 2)  # sd/√2 of two numbers


def test_batches_add_up_to_one_run_and_one_context_has_no_error() -> None:
    sites = [SplicedSite(mlp_site(1), random_transcoder(), MEAN)]
    whole, _ = evaluated(sites)
    single = [ContextBatch(BATCH.contexts[c : c + 1], TOKENS[c : c + 1], WHERE[c : c + 1]) for c in (0, 1)]
    pieces, _ = evaluated(sites, batches=single)
    for kind in ("spliced", "zero", "mean"):
        assert getattr(pieces["layer1"], kind).ce == pytest.approx(getattr(whole["layer1"], kind).ce, abs=1e-6)
    assert pieces["layer1"].in_place["layer1"].fvu == pytest.approx(whole["layer1"].in_place["layer1"].fvu, rel=1e-5)
    assert evaluated(sites, batches=single[:1])[0]["layer1"].ce_increase_error is None


def test_a_score_survives_its_record() -> None:
    scores, _ = evaluated(
        [SplicedSite(autoencoder_site("blocks.0.attn.hook_q[0]", 4), random_transcoder(4, 4), MEAN[:4])]
    )
    (score,) = scores.values()
    assert score.spliced.pattern_kl
    assert SpliceScore.from_record(score.record()) == score


def test_a_float32_transcoder_is_scored_in_a_bfloat16_model() -> None:
    settings = ModelSettings(model=tiny_model().bridge.cfg.model_name, model_dtype="bfloat16")
    spliced = SplicedSite(mlp_site(1), random_transcoder(), MEAN)
    rounded = Evaluation(load_language_model(settings).bridge, {"layer1": [spliced]})
    rounded.add(BATCH)
    scores, _ = evaluated([SplicedSite(mlp_site(1), random_transcoder(), MEAN)])
    for kind in ("spliced", "zero", "mean"):
        expected = getattr(scores["layer1"], kind)
        assert getattr(rounded.scores()["layer1"], kind).ce == pytest.approx(expected.ce, abs=0.1)
        assert getattr(rounded.scores()["layer1"], kind).kl == pytest.approx(expected.kl, rel=0.2)


# ---- attention


def patterns_with(family: str, site: Site, substitute: Substitute) -> tuple[Tensor, Tensor]:
    """Attention patterns of layer 1 (contexts, heads, destinations, sources), as they are and with a site replaced."""
    bridge = tiny_model(family).bridge
    with torch.inference_mode():
        _, plain = bridge.run_with_cache(TOKENS, use_cache=False)
        with replaced(bridge, {site: substitute}):
            _, changed = bridge.run_with_cache(TOKENS, use_cache=False)
    return plain["blocks.1.attn.hook_pattern"].double(), changed["blocks.1.attn.hook_pattern"].double()


def mean_divergence(p: Tensor, q: Tensor) -> float:
    return torch.where(p > 0, p * (p / q.clamp_min(1e-300)).log(), 0).sum(-1).mean().item()


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k", "blocks.1.attn.q.hook_out"])
def test_the_pattern_of_the_sites_own_head_is_compared_head_zero_included(hook: str, head: int) -> None:
    site = autoencoder_site(f"{hook}[{head}]", D_HEAD)
    coder = random_transcoder(D_HEAD, D_HEAD)
    scores, _ = evaluated([SplicedSite(site, coder, MEAN[:D_HEAD])])
    for kind, substitute in (("spliced", Transcoded(coder)), ("zero", ZeroAblated())):
        plain, changed = patterns_with("gpt2", site, substitute)
        others = [h for h in range(4) if h != head]
        assert torch.equal(changed[:, others], plain[:, others])
        moved = getattr(scores[site.name], kind).pattern_kl
        assert list(moved) == [site.name]
        assert moved[site.name] == pytest.approx(mean_divergence(plain[:, head], changed[:, head]), rel=1e-4, abs=1e-6)
        assert moved[site.name] > 1e-3


def test_a_head_of_keys_is_scored_by_the_query_heads_that_share_it() -> None:
    site = autoencoder_site("blocks.1.attn.hook_k[1]", D_HEAD)  # the tiny llama has 4 heads and 2 of keys
    scores, _ = evaluated([SplicedSite(site, random_transcoder(D_HEAD, D_HEAD), MEAN[:D_HEAD])], "llama")
    plain, changed = patterns_with("llama", site, ZeroAblated())
    assert torch.equal(plain[:, :2], changed[:, :2])
    moved = scores[site.name].zero.pattern_kl[site.name]
    assert moved == pytest.approx(mean_divergence(plain[:, 2:], changed[:, 2:]), rel=1e-4)
    assert moved > 1e-3


def test_sites_that_make_no_pattern_have_no_pattern_score() -> None:
    site = autoencoder_site("blocks.1.attn.hook_z[0]", D_HEAD)
    scores, _ = evaluated([SplicedSite(site, random_transcoder(D_HEAD, D_HEAD), MEAN[:D_HEAD])])
    assert scores[site.name].spliced.pattern_kl == {}


# ---- what cannot be scored


def test_a_transcoder_that_overflows_is_refused_with_its_context() -> None:
    broken = random_transcoder()
    broken.b_dec_out.fill_(float("nan"))
    with pytest.raises(NonFiniteActivation, match="layer1, spliced: the loss of context 7 is not finite"):
        evaluated([SplicedSite(mlp_site(1), broken, MEAN)])


def test_a_transcoder_of_another_width_is_refused() -> None:
    with pytest.raises(ModelError, match="site layer1: the transcoder has d_out 8, the site 16"):
        evaluated([SplicedSite(mlp_site(1), random_transcoder(d_out=8), MEAN)])


def test_an_evaluation_leaves_the_model_as_it_was() -> None:
    bridge = tiny_model().bridge
    with torch.inference_mode():
        before = bridge(TOKENS, return_type="logits", use_cache=False)
        evaluated(
            [SplicedSite(mlp_site(1), random_transcoder(), MEAN)],
            batches=[BATCH._replace(where=EVERY_POSITION.expand(2, 10))],
        )
        after = bridge(TOKENS, return_type="logits", use_cache=False)
    assert torch.equal(before, after)
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())
