"""Edits of a transcoder's features do what they say, to the features and positions they name and to nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tailrace.analysis.interventions.features import (
    Ablate,
    Add,
    Clamp,
    Edit,
    EditedFeatures,
    EditedNeurons,
    KeepOnly,
    Scale,
)
from tailrace.analysis.splice.replacement import EVERY_POSITION, Transcoded, replaced
from tailrace.storage.errors import ModelError, SettingsError
from tests.support.spliced_models import (
    TOKENS,
    autoencoder_site,
    logits_with_module_hooks,
    mlp_site,
    plain_logits,
    random_transcoder,
    run_with,
    tiny_model,
)

ACTIVATIONS = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [4.0, 0.0, 6.0, 0.0]]])  # one context, two positions, four features


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (Ablate((1, 2)), [[0, 0, 0, 3], [4, 0, 0, 0]]),
        (KeepOnly((1, 2)), [[0, 1, 2, 0], [0, 0, 6, 0]]),
        (KeepOnly(()), [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (Clamp((0,), 7.0), [[7, 1, 2, 3], [7, 0, 6, 0]]),
        (Add((0, 3), value=0.5), [[0.5, 1, 2, 3.5], [4.5, 0, 6, 0.5]]),
        (Scale((2,), factor=2.0), [[0, 1, 4, 3], [4, 0, 12, 0]]),
        (Ablate((2,), where=torch.tensor([[False, True]])), [[0, 1, 2, 3], [4, 0, 0, 0]]),
        (KeepOnly((0,), where=torch.tensor([[True, False]])), [[0, 0, 0, 0], [4, 0, 6, 0]]),
    ],
)
def test_an_edit_changes_its_features_at_its_positions(edit: Edit, expected: list[list[float]]) -> None:
    before = ACTIVATIONS.clone()
    assert edit(before).tolist() == [expected]
    assert torch.equal(before, ACTIVATIONS)  # a copy is changed, not the model's own


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Clamp((1,), EVERY_POSITION), r"Clamp: value is a tensor of torch\.bool, wanted a finite number"),  # type: ignore[arg-type]
        (lambda: Add((1,), float("nan")), "Add: value is nan, wanted a finite number"),
        (lambda: Scale((1,), "2"), "Scale: factor is '2', wanted a finite number"),  # type: ignore[arg-type]
        (lambda: Clamp(1850, value=30.0), r"Clamp: features is 1850, wanted feature numbers such as \(1850,\)"),  # type: ignore[arg-type]
        (lambda: Ablate((1.5,)), "Ablate: features is"),  # type: ignore[arg-type]
        (lambda: KeepOnly((1,), where=3.0), r"KeepOnly: where is 3\.0, wanted a bool tensor"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_an_edit_of_the_wrong_kind_of_values_is_refused_when_it_is_made(make: Any, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        make()
    with pytest.raises(TypeError, match="positional"):
        Ablate((1,), EVERY_POSITION)  # type: ignore[call-arg]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("edit", [KeepOnly((3, 5)), Ablate(tuple(range(12))), Clamp((4,), value=3.0)])
def test_an_edited_transcoder_in_place_equals_the_module_swapped_for_it(family: str, edit: Edit) -> None:
    transcoder = random_transcoder()

    def edited(_module: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        activations = transcoder.encode(inputs[0])
        for feature in range(transcoder.d_sae):
            is_edited = feature in edit.features
            if isinstance(edit, Clamp) and is_edited:
                activations[..., feature] = edit.value
            if (isinstance(edit, Ablate) and is_edited) or (isinstance(edit, KeepOnly) and not is_edited):
                activations[..., feature] = 0
        return activations @ transcoder.W_dec + transcoder.b_dec_out

    found = run_with(family, {mlp_site(1): EditedFeatures(transcoder, [edit])}, EVERY_POSITION)
    torch.testing.assert_close(found, logits_with_module_hooks(family, {".1.mlp": edited}), rtol=1e-4, atol=1e-5)
    assert (found - run_with(family, {mlp_site(1): Transcoded(transcoder)}, EVERY_POSITION)).abs().max() > 1e-3


def test_keeping_no_feature_leaves_the_bias_and_the_skip_path() -> None:
    transcoder = random_transcoder(skip=True)
    inputs = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(3))
    assert transcoder.W_skip is not None
    expected = inputs @ transcoder.W_skip.T + transcoder.b_dec_out
    torch.testing.assert_close(EditedFeatures(transcoder, [KeepOnly(())])(inputs, torch.empty(2, 10, 16)), expected)


def test_edits_are_applied_in_order() -> None:
    transcoder = random_transcoder()
    inputs, outputs = torch.randn(2, 2, 10, 16, generator=torch.Generator().manual_seed(4))
    kept_then_clamped = EditedFeatures(transcoder, [KeepOnly(()), Clamp((2,), value=1.5)])(inputs, outputs)
    torch.testing.assert_close(kept_then_clamped, (1.5 * transcoder.W_dec[2] + transcoder.b_dec_out).expand(2, 10, 16))
    clamped_then_kept = EditedFeatures(transcoder, [Clamp((2,), value=1.5), KeepOnly(())])(inputs, outputs)
    torch.testing.assert_close(clamped_then_kept, transcoder.b_dec_out.expand(2, 10, 16))


def test_steering_adds_what_the_edit_changes_to_the_models_own_output() -> None:
    transcoder = random_transcoder()
    nothing = {mlp_site(1): EditedFeatures(transcoder, [Scale((0, 1), factor=1.0)], on_top_of="model")}
    assert torch.equal(run_with("gpt2", nothing), plain_logits(tiny_model()))
    steered = run_with(
        "gpt2", {mlp_site(1): EditedFeatures(transcoder, [Add((6,), value=2.0)], on_top_of="model")}, EVERY_POSITION
    )
    expected = logits_with_module_hooks("gpt2", {".1.mlp": lambda *call: call[2] + 2 * transcoder.W_dec[6]})
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_neurons_are_edited_where_the_mlp_has_them(family: str) -> None:
    site = autoencoder_site("blocks.1.mlp.hook_post", 64)
    down = {"gpt2": ".1.mlp.c_proj", "llama": ".1.mlp.down_proj"}[family]
    kept = EditedNeurons([KeepOnly((0, 7))])

    def others_zero(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = module.weight.T if family == "llama" else module.weight  # (neurons, d_model)
        bias = 0 if module.bias is None else module.bias
        return inputs[0][..., [0, 7]] @ weight[[0, 7]] + bias

    found = run_with(family, {site: kept}, EVERY_POSITION)
    torch.testing.assert_close(found, logits_with_module_hooks(family, {down: others_zero}), rtol=1e-4, atol=1e-5)


def test_every_feature_that_does_not_exist_is_named_before_anything_runs() -> None:
    transcoder = random_transcoder(d_in=8)
    substitutes = {
        mlp_site(0): EditedFeatures(transcoder, [Ablate((1, 24)), Clamp((-1,), value=1.0)]),
        autoencoder_site("blocks.1.mlp.hook_post", 64): EditedNeurons([KeepOnly((64,))]),
    }
    with pytest.raises(ModelError) as caught, replaced(tiny_model().bridge, substitutes):
        pass
    message = str(caught.value)
    assert "site layer0: the transcoder has d_in 8, the site 16" in message
    assert "site layer0: Ablate: there is no feature 24; there are 0 to 23" in message
    assert "site layer0: Clamp: there is no feature -1" in message
    assert "KeepOnly: there is no feature 64; there are 0 to 63" in message
    assert plain_logits(tiny_model()).shape[:2] == TOKENS.shape
