"""The loss that SAELens computes with an export attached is the loss that we compute with the transcoder in place.

Each combination of releases runs in an environment of its own, as in ``test_interop_packages``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tailrace.analysis.splice.replacement import EVERY_POSITION, Transcoded, replaced
from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.hooks import hooked_transformer_name
from tailrace.pipeline.formats.settings import ExportSettings
from tailrace.pipeline.model.language_model import LanguageModel, SiteHooks, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.cache_format import Site
from tailrace.training.architectures import JumpReLU, ReLU, TopK
from tests.support.interop import LOAD_HOOKED, SAELENS, run_in
from tests.support.layered_transcoders import publish_transcoder, random_transcoder
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.interop

LENS_3, LENS_2, _ = SAELENS
TOKENS = torch.randint(3, 40, (4, 24), generator=torch.Generator().manual_seed(0))
WIDTH = 16
CLOSE = 1e-5

LOSSES = (
    LOAD_HOOKED
    + """
from sae_lens import SAE, HookedSAETransformer
tokens = torch.tensor(given["tokens"])
model = load(HookedSAETransformer)
losses = {}
with torch.no_grad():
    _, held = model.run_with_cache(tokens)
    for name, kept in load_file(given["vectors"]).items():
        kept = kept.view(*tokens.shape, -1)
        torch.testing.assert_close(held[name].flatten(2), kept, rtol=1e-4, atol=1e-4, msg=name)
    for name, folder in given["folders"].items():
        coder = SAE.load_from_disk(folder)
        attached = model.run_with_saes(tokens, saes=[coder], return_type="loss").item()
        hook_in, hook_out = coder.cfg.metadata.hook_name, coder.cfg.metadata.hook_name_out
        read = {}
        hooks = [
            (hook_in, lambda values, hook: read.update(values=values)),
            (hook_out, lambda values, hook: coder(read["values"])),
        ]
        hooked = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks).item()
        losses[name] = {"attached": attached, "hooked": hooked}
Path(given["out"]).write_text(json.dumps(losses))
"""
)
BRIDGE_LOSSES = """
import json, sys
import torch
from pathlib import Path
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
given = json.loads(sys.argv[1])
tokens = torch.tensor(given["tokens"])
model = SAETransformerBridge.boot_transformers(given["model"])
losses = {}
with torch.no_grad():
    for name, folder in given["folders"].items():
        logits = model.run_with_saes(tokens, saes=[SAE.load_from_disk(folder)])
        losses[name] = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
Path(given["out"]).write_text(json.dumps(losses))
"""


def mlp(layer: int) -> Site:
    return Site("mlp", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out", WIDTH, WIDTH, "float32")


def one_hook(hook: str) -> Site:
    return Site(hook, hook, hook, WIDTH, WIDTH, "float32")


def our_loss(model: LanguageModel) -> float:
    with torch.no_grad():
        logits = model.bridge(TOKENS)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item()


def export_all(path: Path, model: LanguageModel, kinds: dict[str, tuple[Any, ...]]) -> dict[str, float]:
    """Export a transcoder of every kind to ``path/NAME/theirs``; return the losses with each in place.

    All are clearly different from the model's own.
    """
    losses, own = {}, our_loss(model)
    for name, (architecture, site, *settings) in kinds.items():
        module = random_transcoder(architecture, site)
        publish_transcoder(path / name / "ours", module, architecture, site, model=model.identity())
        export.run(
            ExportSettings(**dict(settings)),
            to="saelens",
            sources=[path / name / "ours"],
            output=path / name / "theirs",
            model=str(path / "model"),
        )
        with replaced(model.bridge, {site: Transcoded(module)}, where=EVERY_POSITION):
            losses[name] = our_loss(model)
        assert abs(losses[name] - own) > 1e-3 * own
    return losses


def arguments(path: Path, names: list[str]) -> dict[str, Any]:
    folders = {name: str(path / name / "theirs") for name in names}
    return {
        "tokens": TOKENS.tolist(),
        "model": str(path / "model"),
        "folders": folders,
        "vectors": str(path / "vectors.safetensors"),
        "out": str(path / "losses.json"),
    }


def save_vectors(path: Path, model: LanguageModel, *, without: tuple[str, ...]) -> None:
    """Save what every hook holds that has a name in ``HookedTransformer``, under that name."""
    patterns = ("hook_pattern", "hook_attn_scores")  # of pairs of positions: no cache holds them
    names = {hook: hooked_transformer_name(hook, model.identity()) for hook in model.bridge.hook_dict}
    known = {
        hook: name for hook, name in names.items() if name is not None and not name.endswith((*patterns, *without))
    }
    assert {"blocks.1.mlp.hook_out", "blocks.1.hook_in", "blocks.1.attn.o.hook_in", "embed.hook_out"} <= known.keys()
    held = model.capture(TOKENS, [SiteHooks(str(number), hook, hook) for number, hook in enumerate(known)])
    save_file({name: held[hook].float().clone() for hook, name in known.items()}, path / "vectors.safetensors")


@pytest.mark.parametrize("releases", SAELENS)
def test_saelens_loss_with_an_export_attached_is_ours(tmp_path, releases):
    transcoders = {
        "relu": (ReLU(), mlp(1)),
        "jump": (JumpReLU(), mlp(0)),
        "skip": (ReLU(skip=True), mlp(1)),
        "folded": (ReLU(), mlp(1), ("fold_norm", True)),
    }
    autoencoders = {
        "mlp-out": (ReLU(), one_hook("blocks.1.mlp.hook_out")),
        "attention-out": (JumpReLU(), one_hook("blocks.1.attn.hook_out")),
        "stream": (TopK(k=3), one_hook("blocks.1.hook_resid_pre")),
        "block-out": (ReLU(), one_hook("blocks.0.hook_out")),
    }
    folder = save_tiny_model(tmp_path / "model", seed=3)
    model = load_language_model(ModelSettings(model=str(folder)))
    ours = export_all(tmp_path, model, {**transcoders, **autoencoders})
    save_vectors(tmp_path, model, without=() if releases == LENS_3 else ("hook_normalized",))
    run_in(releases, LOSSES, arguments(tmp_path, list(ours)))
    theirs = json.loads((tmp_path / "losses.json").read_text())
    # what the export says of these: SAELens leaves out the path past the features, releases before 6.34 put a
    # transcoder's output in place of its input, and TransformerLens 2 has another vector under ln2.hook_normalized
    wrong = {"skip"} if releases == LENS_3 else {"skip", "folded"} if releases == LENS_2 else set(transcoders)
    for name, loss in ours.items():
        assert (theirs[name]["attached"] == pytest.approx(loss, rel=CLOSE)) == (name not in wrong), name
        by_hooks = releases == LENS_3 or name != "folded"
        assert (theirs[name]["hooked"] == pytest.approx(loss, rel=CLOSE)) == by_hooks, name


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_saelens_bridge_has_the_hooks_of_every_export_and_the_same_loss(tmp_path, family):
    folder = save_tiny_model(tmp_path / "model", family, seed=3)
    model = load_language_model(ModelSettings(model=str(folder)))
    kinds = {
        "relu": (ReLU(), mlp(1)),
        "mlp-out": (ReLU(), one_hook("blocks.1.mlp.hook_out")),
        "norm-out": (ReLU(), one_hook("blocks.1.ln1.hook_out")),
    }
    ours = export_all(tmp_path, model, kinds)
    run_in(LENS_3, BRIDGE_LOSSES, arguments(tmp_path, list(ours)))
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(ours, rel=CLOSE)
