"""What a live run refuses without loading its language model, and what it leaves behind: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.live_source import names_asked_for
from tailrace.storage.errors import SettingsError, TextError
from tailrace.training.loop.settings import TrainSettings
from tests.support.live_runs import live_settings

BASE: dict[str, Any] = {"architecture": {"kind": "topk", "k": 4}, "d_sae": 32, "steps": 1, "batch_rows": 32}


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings.read(BASE, changes)


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the language model was loaded")

    monkeypatch.setattr("tailrace.pipeline.live.batches.load_language_model", load)


def refused(output: Path, live: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """Return the sentences a run is refused with."""
    with pytest.raises(SettingsError) as caught:
        train.run(
            settings(**changes), live=live_settings(**live or {}), output=output, compute=Compute(threads=1, quiet=True)
        )
    assert not output.exists()
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


DRAWN = "needs training rows drawn at random, and live rows come in one order; train from a cache, or leave it out"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bias_init": "geometric_median"}, f"bias_init: geometric_median {DRAWN}"),
        ({"decoder_init": "data"}, f"decoder_init: data {DRAWN}"),
        ({"max_norm_multiple": 10}, f"max_norm_multiple: 10 {DRAWN}"),
        ({"resampling": {"kind": "l2"}}, f"resampling: l2 {DRAWN}"),
        ({"steps": None}, "epochs: how many rows the text gives is not known in live mode; give rows or steps"),
        (
            {"batch_rows": 100},
            "buffer_rows is 384, wanted at least 400: four batches; raise it, or lower batch_rows",
        ),
        ({"site": "layer7"}, "site: there is no site 'layer7'; did you mean layer0? there is layer0"),
    ],
)
def test_a_setting_that_live_rows_cannot_serve_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    assert refused(tmp_path / "t", **changes) == [sentence]


def test_the_best_weights_are_not_kept_without_held_out_documents(tmp_path: Path) -> None:
    sentence = "keep_best needs held-out rows, and holdout is 0; leave it out, or hold out documents"
    assert refused(tmp_path / "t", {"holdout": "0"}, keep_best=True) == [sentence]


def test_all_that_is_known_before_is_told_at_once(tmp_path: Path) -> None:
    found = refused(
        tmp_path / "t",
        {"layers": "0,1", "holdout": "none"},
        steps=None,
        bias_init="geometric_median",
        decoder_init="data",
        max_norm_multiple=10,
        resampling={"kind": "anthropic"},
        keep_best=True,
        batch_rows=100,
        architecture={"kind": "topk", "k": 33},
    )
    assert [line.split(":")[0].split(" ")[0] for line in found] == [
        "epochs", "bias_init", "decoder_init", "max_norm_multiple", "resampling", "keep_best", "buffer_rows", "site",
        "architecture.k",
    ]  # fmt: skip
    assert any(line.startswith("site: there are 2, layer0, layer1; choose one with --site, all with") for line in found)


def test_a_text_that_is_not_there_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    live = live_settings(dataset=str(tmp_path / "nothing.txt"))
    with pytest.raises(TextError, match=r"nothing\.txt"):
        train.run(settings(), live=live, output=tmp_path / "t", compute=Compute(threads=1, quiet=True))


def test_a_sweep_of_which_every_run_is_refused_loads_nothing_and_names_each(tmp_path: Path) -> None:
    runs = {"a": settings(bias_init="geometric_median"), "b": settings(max_norm_multiple=10)}
    with pytest.raises(SettingsError, match=r"(?s)a: .*bias_init: geometric_median.*b: .*max_norm_multiple: 10"):
        sweep.run(runs, live=live_settings(), output=tmp_path / "s", compute=Compute(threads=1, quiet=True))
    assert not (tmp_path / "s").exists()


def test_names_of_sites_are_those_that_the_model_would_give_them() -> None:
    hooks = (
        "mine=blocks.0.hook_in:blocks.1.hook_out",
        "blocks.3.attn.hook_z[5]",
        "blocks.2.mlp.hook_in:blocks.2.mlp.hook_out",
    )
    assert names_asked_for(live_settings(layers="0,4-5", hooks=hooks)) == [
        "layer0", "layer4", "layer5", "mine", "blocks.3.attn.hook_z.head5", "layer2",
    ]  # fmt: skip


@pytest.mark.parametrize("layers", ["all", "5-4", "0,0"])
def test_names_are_left_to_the_model_where_it_decides_or_refuses_them(layers: str) -> None:
    assert names_asked_for(live_settings(layers=layers)) is None
