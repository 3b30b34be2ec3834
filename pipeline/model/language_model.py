"""The language model as the pipeline sees it: text to tokens, tokens to the activations at chosen sites.

Weights are raw by default, as published. ``compatibility`` folds norms into them as older tools did, and then the
same hook holds another vector, so an activation means nothing without the identity recorded here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.model import capture as activation_capture
from tailrace.pipeline.model import sites
from tailrace.pipeline.model.capture import PairingCheck
from tailrace.pipeline.model.loading import Checkpoint, boot, choose_dtype, compile_mlps, open_checkpoint, parse_device
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.model.tokenizer import ModelTokenizer, open_tokenizer
from tailrace.storage.artifact import JSON, checksum_file, digest
from tailrace.storage.errors import ModelError

__all__ = ["LanguageModel", "PairingCheck", "SiteHooks", "load_language_model"]

logger = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PROBE_POSITIONS = 7  # of the pass that finds out widths and heads; a number that is no usual number of heads
_LIBRARIES = ("torch", "transformer_lens", "transformers", "tokenizers")


class LanguageModel:
    """A loaded language model; made by ``load_language_model``."""

    def __init__(self, bridge: Any, tokenizer: ModelTokenizer, settings: ModelSettings, checkpoint: Checkpoint) -> None:
        self.bridge = bridge
        """The TransformerLens model, for what needs more than activations: losses, interventions, circuits."""
        self._tokenizer = tokenizer
        self._settings = settings
        self._checkpoint = checkpoint
        self._points: Mapping[str, Any] = bridge.hook_dict

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.bridge.cfg.n_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.bridge.cfg.d_model)

    @property
    def d_vocab(self) -> int:
        """Number of token ids the model accepts."""
        return int(self.bridge.cfg.d_vocab)

    @property
    def max_context_length(self) -> int:
        """The longest context the model was made for, in tokens."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.bridge.original_model.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.bridge.original_model.parameters()).device  # type: ignore[no-any-return]

    @property
    def bos_token_id(self) -> int:
        """Token that begins every context."""
        return self._tokenizer.bos.token_id

    @property
    def separator_token_id(self) -> int:
        """Token that ends every document."""
        return self._tokenizer.separator.token_id

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Every token the tokenizer calls special, the BOS and the separator among them."""
        return self._tokenizer.special_token_ids

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; no special token is added and nothing is cut."""
        return self._tokenizer.tokenize(texts)

    def vocabulary(self) -> list[str]:
        """Return the text of every token id, ``d_vocab`` of them."""
        return self._tokenizer.vocabulary()

    def resolve_sites(self, layers: str | None, hooks: Sequence[str] = ()) -> list[SiteHooks]:
        """Return the sites of ``layers`` (``"0,3,8-11"``, ``"all"``) and ``hooks``; see ``sites.resolve_sites``."""
        return sites.resolve_sites(
            layers, hooks, n_layers=self.n_layers, hook_names=self._points, count_heads=self._count_heads
        )

    def capture(self, tokens: Tensor, sites: Sequence[SiteHooks]) -> dict[str, Tensor]:
        """Return each hook's activations (contexts, positions, d) for ``tokens`` (contexts, positions), in one pass.

        By the sites' names of their hooks: ``HOOK[H]`` is a slice of width d_head, a view of what ``HOOK`` holds.
        The pass stops at the last hook wanted. The tensors belong to the model: use or copy them before the next
        call. Raises ModelError if a token id or the length is beyond the model or a hook does not fire, and
        OutOfMemoryError, naming the batch size to try.
        """
        self._check_tokens(tokens)
        hooks = activation_capture.unique_hooks(sites)
        return activation_capture.capture(self.bridge, self._points, hooks, tokens.to(self.device))

    def widths(self, sites: Sequence[SiteHooks]) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of each site, found by running one short context."""
        captured = self.capture(self._short_context(), sites)
        return {site.name: (captured[site.hook_in].shape[-1], captured[site.hook_out].shape[-1]) for site in sites}

    def check_pairing(self, tokens: Tensor, site: SiteHooks) -> PairingCheck:
        """Return whether the captured output of ``site`` is its MLP applied to the captured input, bit for bit."""
        if self._mlp(site) is None:
            return PairingCheck(applicable=False)
        captured = self.capture(tokens, [site])
        return self.compare_pair(site, captured[site.hook_in], captured[site.hook_out])

    def compare_pair(self, site: SiteHooks, inputs: Tensor, outputs: Tensor) -> PairingCheck:
        """Compare ``outputs`` with the MLP of ``site`` applied to ``inputs``, both (…, d); stored rows for instance.

        Equality bit for bit can be expected only of a batch of the shape that made the outputs.
        """
        mlp = self._mlp(site)
        if mlp is None:
            return PairingCheck(applicable=False)
        batched = (1, *inputs.shape) if inputs.ndim == 2 else tuple(inputs.shape)
        on_model = (side.to(self.device, self.dtype) for side in (inputs, outputs))
        mlp_in, mlp_out = (side.reshape(*batched[:-1], -1) for side in on_model)
        return activation_capture.compare_pair(mlp, mlp_in, mlp_out)

    def identity(self) -> dict[str, JSON]:
        """Return what decides every activation, as JSON; holds no path, only a folder's own name.

        ``versions`` are for the record: activations of other versions agree within rounding, not bit for bit.
        """
        return {
            "name": Path(self._checkpoint.name).resolve().name if self._checkpoint.is_local else self._settings.model,
            "revision": self._checkpoint.commit,
            "files_digest": _files_digest(Path(self._checkpoint.name)) if self._checkpoint.is_local else None,
            "architecture": type(self.bridge.original_model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processing": self._settings.processing,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "d_vocab": self.d_vocab,
            "max_context_length": self.max_context_length,
            "tokenizer": self._tokenizer.identity(),
            "versions": {library: version(library) for library in _LIBRARIES},
        }

    def _count_heads(self, hooks: Sequence[str]) -> dict[str, int]:
        tokens = self._short_context().to(self.device)
        return activation_capture.count_heads(self.bridge, self._points, hooks, tokens)

    def _short_context(self) -> Tensor:
        return torch.full((1, min(_PROBE_POSITIONS, self.max_context_length)), self.bos_token_id)

    def _mlp(self, site: SiteHooks) -> Any:
        """Return the module whose input and output ``site`` claims to hold; None where that cannot be recomputed."""
        if self._settings.processing != "raw" or site.default_layer is None:
            return None
        mlp = getattr(self.bridge.blocks[site.default_layer], "mlp", None)
        # Some families keep the MLP's matrices directly in the block: hooks exist, but no module to call.
        return mlp if getattr(mlp, "name", None) is not None else None

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[1] > self.max_context_length:
            raise ModelError(
                f"token ids of shape {tuple(tokens.shape)}: wanted (contexts, positions) with at most "
                f"{self.max_context_length} positions, the longest context of {self._settings.model}"
            )
        smallest, largest = int(tokens.min()), int(tokens.max())
        if smallest < 0 or largest >= self.d_vocab:
            raise ModelError(
                f"token ids reach from {smallest} to {largest}, but {self._settings.model} knows 0 to "
                f"{self.d_vocab - 1}: they were made by another model's tokenizer"
            )


def load_language_model(settings: ModelSettings, *, device: str = "cpu", compile_model: bool = False) -> LanguageModel:
    """Load a language model and its tokenizer from the hub or a folder.

    With ``compile_model``, MLPs are compiled: the same activations within rounding, not bit for bit.
    Raises ModelError if that cannot be done, saying what to do instead.
    """
    place = parse_device(device)
    checkpoint = open_checkpoint(settings.model, settings.revision)
    opened = open_tokenizer(checkpoint)  # before the weights: it fails sooner
    dtype = choose_dtype(checkpoint, settings.model_dtype, place)
    bridge = boot(checkpoint, dtype, place, settings.processing)
    if compile_model:
        compile_mlps(bridge)
    tokenizer = ModelTokenizer(
        opened, name=settings.model, d_vocab=int(bridge.cfg.d_vocab), bos_token_id=settings.bos_token_id
    )
    logger.info("loaded %s in %s on %s", settings.model, str(dtype).removeprefix("torch."), place)
    return LanguageModel(bridge, tokenizer, settings, checkpoint)


def _files_digest(folder: Path) -> str:
    """Return one digest of a folder's configuration and weights; the tokenizer has its own."""
    files = [path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES or path.name == "config.json"]
    return digest({path.name: checksum_file(path) for path in files})
