"""The formats of other tools, and the settings of ``pipeline export`` and ``pipeline import``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tailrace.storage.settings import Quantity, Settings

Format = Literal["saelens", "circuit-tracer", "sparsify", "circuit-tracer-features", "delphi"]

FORMATS: dict[Format, str] = {
    "saelens": "one transcoder or autoencoder: cfg.json, sae_weights.safetensors",
    "circuit-tracer": "transcoders of every layer as a set: config.yaml, layer_N.safetensors; or one cross-layer "
    "transcoder: config.yaml, W_enc_N.safetensors, W_dec_N.safetensors",
    "sparsify": "TopK transcoders by module: MODULE/cfg.json, MODULE/sae.safetensors",
    "circuit-tracer-features": "tables of any layers for its viewer: features/index.json.gz, layer_N.bin",
    "delphi": "tables with activations for automated interpretation: latents/MODULE/",
}
"""Every format with what is put into it and what comes out."""

TABLE_FORMATS: tuple[Format, ...] = ("circuit-tracer-features", "delphi")
"""Formats made of tables; the others are made of transcoders."""


class ExportSettings(Settings):
    """What an export shall hold."""

    model_name: str | None = None
    """Name by which the other tool loads the language model; by default the recorded one."""

    rows: Quantity = Field(default=65_536, ge=1)
    """TopK to saelens, circuit-tracer: rows of --cache on which thresholds in place of k are chosen, and as many
    held-out rows on which their cost is measured."""

    fold_norm: bool = False
    """saelens, circuit-tracer: fold the gain and bias of the norm before the MLP into the transcoder, which then reads
    ln2.hook_normalized and writes hook_mlp_out, as in HookedTransformer. Loads the language model."""

    module: str | None = None
    """sparsify, delphi: module the transcoder belongs to, such as layers.3.mlp, where it is not known by itself."""

    scan: str | None = None
    """circuit-tracer: name under which the viewer finds the features of the set."""

    def given_for_others(self, to: Format) -> list[str]:
        """Return a sentence for each setting that another format than ``to`` has."""
        of = {
            "rows": ("saelens", "circuit-tracer"),
            "fold_norm": ("saelens", "circuit-tracer"),
            "module": ("sparsify", "delphi"),
            "scan": ("circuit-tracer",),
        }
        return [
            f"--{name.replace('_', '-')}: is a setting of {' and '.join(formats)}, not of {to}; leave it out"
            for name, formats in of.items()
            if name in self.model_fields_set and getattr(self, name) and to not in formats
        ]


Origin = Literal["saelens", "circuit-tracer", "gemma-scope", "sparsify", "dictionary-learning", "reference"]

ORIGINS: dict[Origin, str] = {
    "saelens": "folder with cfg.json and sae_weights.safetensors",
    "circuit-tracer": "one layer's file layer_N.safetensors, its set's config.yaml beside it; or the folder of a "
    "cross-layer transcoder",
    "gemma-scope": "params.npz, or params.safetensors with config.json beside it",
    "sparsify": "one module's folder with cfg.json and sae.safetensors, or a folder with that one in it",
    "dictionary-learning": "folder with config.json and ae.pt",
    "reference": "checkpoint (.pt, .pkl, .pkl.gz) of the original transcoders code, nothing in which is run; or its "
    "tensors alone (.safetensors)",
}
"""Every format that can be read, with what to give."""


class ImportSettings(Settings):
    """What an imported transcoder is taken for."""

    site: str | None = None
    """Site of the cache that it belongs to; by default the one whose hooks the files name. Of a cross-layer transcoder,
    all of them, lowest layer first: A,B,C."""

    rows: Quantity = Field(default=65_536, ge=1)
    """Rows of the cache on which FVU and L0 are measured, held-out ones if there are any."""
