"""The language model as the pipeline sees it: text to tokens, tokens to the activations at chosen sites.

Weights are raw by default, as published. ``compatibility`` folds norms into them as older tools did, and then the
same hook holds another vector, so an activation means nothing without the identity recorded here.

A pass is abandoned as soon as the last wanted hook has fired: no later layer, and no unembedding, is computed. Hooks
are put on TransformerLens's hook points directly, because its own ``run_with_cache`` rebuilds the table of hook names
on every call, keeps every attention pattern until the end and computes logits for the last layer.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.model import sites
from tailrace.pipeline.model.checks import check_passes, computed_output, misnamed_hooks, mlps_of_more_than_their_input
from tailrace.pipeline.model.loading import (
    Checkpoint,
    boot,
    check_kind,
    choose_dtype,
    compile_mlps,
    has_tokenizer,
    open_checkpoint,
    parse_device,
    quiet,
)
from tailrace.pipeline.model.locations import folder_digest, remember
from tailrace.pipeline.model.recorded_pass import RepeatedPasses
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.sites import SiteHooks, head_problem
from tailrace.pipeline.model.tokenizer import (
    ChatTokens,
    ModelTokenizer,
    number_tokens,
    open_tokenizer,
    read_stated_tokens,
)
from tailrace.storage.artifact import JSON, digest
from tailrace.storage.cache_format import HookName
from tailrace.storage.errors import ActionableError, ModelError, OutOfMemoryError, is_out_of_memory
from tailrace.storage.layout import relative_error
from tailrace.training.rows.transfer import to_device

__all__ = ["LanguageModel", "PairingCheck", "SiteHooks", "load_language_model"]

logger = logging.getLogger(__name__)

_HOOK_LEVEL = 712_349  # tells our hooks from anybody else's when they are taken away; any number no one uses
_PROBE_POSITIONS = 7  # of the pass that finds out widths and heads; a number that is no usual number of heads
_LIBRARIES = ("torch", "transformer_lens", "transformers", "tokenizers")


@dataclass(frozen=True)
class PairingCheck:
    """Whether a site's output is its layer's MLP applied to its input, on the rows given."""

    applicable: bool
    """False for sites other than a layer's own MLP and for processed weights; the other fields then say nothing."""
    exact: bool = False
    """Bit for bit."""
    max_abs_difference: float = float("nan")
    relative_error: float = float("nan")
    """Norm of the difference over the norm of the outputs, over all rows; 0 if both are zero."""


class _AllCaptured(Exception):
    """No error: leaves a forward pass that has shown all it was run for."""


class LanguageModel:
    """A loaded language model; made by ``load_language_model``."""

    def __init__(self, bridge: Any, tokenizer: ModelTokenizer, settings: ModelSettings, checkpoint: Checkpoint) -> None:
        self.bridge = bridge
        """The TransformerLens model, for what needs more than activations: losses, interventions, circuits."""
        self._tokenizer = tokenizer
        self._settings = settings
        self._checkpoint = checkpoint
        with quiet():  # of names that lead nowhere, which are refused where they are asked for
            self._points: Mapping[str, Any] = bridge.hook_dict
        self._of_more: Mapping[int, str] = {}
        self._passes = RepeatedPasses()
        self.may_record = False
        """Whether passes over batches of one shape may be recorded as a CUDA graph, which no other thread of the
        process must do at the same time."""

    @property
    def name(self) -> str:
        """What it is recorded as: its name on the hub, or its folder's own name."""
        return Path(self._checkpoint.name).resolve().name if self._checkpoint.is_local else self._settings.model

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

    def tokenize(self, texts: Sequence[str], *, is_markup: bool = True) -> list[list[int]]:
        """Return the token ids of each text; no special token is added and nothing is cut.

        ``is_markup``: the name of a special token in a text is that token, else it is letters like any.
        """
        return self._tokenizer.tokenize(texts, is_markup=is_markup)

    def prompt_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the BOS and the tokens of each text; a BOS that a text begins with is not doubled.

        Contexts of caches begin the same way, whatever the tokenizer does by itself, so features are what they were
        when trained.
        """
        bos = self.bos_token_id
        return [ids if ids[:1] == [bos] else [bos, *ids] for ids in self.tokenize(texts)]

    def tokenize_chat(
        self, messages: list[dict[str, Any]], *, is_markup: bool = False, roles: Collection[str] = ()
    ) -> ChatTokens:
        """Return a conversation as the tokenizer's chat template writes it, and which tokens no one of ``roles`` says.

        Unless it ``is_markup``, the names of special tokens in messages are letters. Raises TextError if the template
        does not take it.
        """
        return self._tokenizer.tokenize_chat(messages, is_markup=is_markup, roles=roles)

    @property
    def chat_template_digest(self) -> str:
        """What decides how conversations are written; raises ModelError if the tokenizer has no chat template."""
        return digest(self._tokenizer.chat_template)

    def vocabulary(self) -> list[str]:
        """Return the text of every token id, ``d_vocab`` of them."""
        return self._tokenizer.vocabulary()

    def resolve_sites(self, layers: str | None, hooks: Sequence[str] = ()) -> list[SiteHooks]:
        """Return the sites of ``layers`` (``"0,3,8-11"``, ``"all"``) and ``hooks``; see ``sites.resolve_sites``.

        Raises ModelError as well for hooks that hold something else in this family than their names say.
        """
        found = sites.resolve_sites(
            layers, hooks, n_layers=self.n_layers, hook_names=self._points, count_heads=self._count_heads
        )
        if problems := misnamed_hooks(self._points, found, self._of_more):
            raise ModelError(sites.listed(problems))
        return found

    def capture(self, tokens: Tensor, sites: Sequence[SiteHooks]) -> dict[str, Tensor]:
        """Return each hook's activations (contexts, positions, d) for ``tokens`` (contexts, positions), in one pass.

        By the sites' names of their hooks: ``HOOK[H]`` is a slice of width d_head, a view of what ``HOOK`` holds.
        The pass stops at the last hook wanted. The tensors belong to the model: use or copy them before the next
        call. Raises ModelError if a token id or the length is beyond the model or a hook does not fire, and
        OutOfMemoryError, naming the batch size to try.
        """
        self._check_tokens(tokens)
        hooks = list(dict.fromkeys(hook for site in sites for hook in (site.hook_in, site.hook_out)))
        tokens = to_device(tokens, self.device)

        def run(tokens: Tensor) -> dict[str, Tensor]:
            return _capture(self.bridge, self._points, hooks, tokens)

        is_recorded = self.may_record and tokens.is_cuda
        return self._passes(run, tuple(hooks), tokens) if is_recorded else run(tokens)

    def widths(self, sites: Sequence[SiteHooks]) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of each site, seen in a pass over one short context."""
        captured = self.capture(self.short_context(), sites)
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
        return _compare_pair(mlp, mlp_in, mlp_out)

    def identity(self, recorded: Mapping[str, Any] | None = None) -> dict[str, JSON]:
        """Return what decides every activation, as JSON; holds no path, only a folder's own name.

        ``recorded`` is what to compare it with: if the files have that digest by the older rule, which took every file
        that looked like weights, it is kept. ``versions`` are for the record: activations of other versions agree
        within rounding, not bit for bit.
        """
        return {
            "name": self.name,
            "revision": self._checkpoint.commit,
            "files_digest": self._files_digest((recorded or {}).get("files_digest")),
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

    def _files_digest(self, recorded: str | None) -> str | None:
        """Return one digest of a folder's configuration and weights, and remember where it is; None for the hub's."""
        if not self._checkpoint.is_local:
            return None
        folder = Path(self._checkpoint.name)
        found = folder_digest(folder, recorded)
        remember(folder, found)
        return found

    def short_context(self) -> Tensor:
        """Return (1, positions) the BOS and a few ordinary tokens, the same ones always, on the model's device."""
        n_others = min(_PROBE_POSITIONS, self.max_context_length) - 1
        special = set(self.special_token_ids)
        ordinary = itertools.cycle([one for one in range(min(self.d_vocab, 100)) if one not in special] or special)
        return torch.tensor([[self.bos_token_id, *itertools.islice(ordinary, n_others)]], device=self.device)

    def check(self) -> None:
        """Run a few tokens and see what MLPs hold; raise ModelError if that fails, or predictions look ahead."""
        tokens = self.short_context()
        with explained_failures(1), without_padding_advice(), quiet():
            check_passes(self.bridge, tokens, self._settings.model)
            self._of_more = mlps_of_more_than_their_input(
                self.bridge, lambda hooks: _capture(self.bridge, self._points, hooks, tokens)
            )

    def _count_heads(self, hooks: Sequence[str]) -> dict[str, int]:
        return _count_heads(self.bridge, self._points, hooks, self.short_context())

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
                f"{self.d_vocab - 1}: they were made by another model's tokenizer, or name a token that it has no "
                "embedding for"
            )


def load_language_model(
    settings: ModelSettings,
    *,
    device: str = "cpu",
    compile_model: bool = False,
    recorded: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Load a language model and its tokenizer from the hub or a folder.

    With ``compile_model``, MLPs are compiled: the same activations within rounding, not bit for bit. ``recorded`` is
    the identity that an artifact has of it: contexts begin and documents end with the tokens recorded there.
    Raises ModelError if that cannot be done, saying what to do instead.
    """
    chosen = parse_device(device)
    checkpoint = open_checkpoint(settings.model, settings.revision)
    check_kind(checkpoint)
    reads_text = has_tokenizer(checkpoint)
    opened = (open_tokenizer if reads_text else number_tokens)(checkpoint)  # before the weights: it fails sooner
    dtype = choose_dtype(checkpoint, settings.model_dtype, chosen)
    stand_in = None if reads_text else number_tokens(checkpoint)
    bridge = boot(checkpoint, dtype, chosen, settings.processing, stand_in)
    tokenizer = ModelTokenizer(
        opened,
        name=settings.model,
        d_vocab=int(bridge.cfg.d_vocab),
        bos_token_id=settings.bos_token_id,
        reads_text=reads_text,
        stated=read_stated_tokens(checkpoint),
        recorded=(recorded or {}).get("tokenizer"),
    )
    logger.info("loaded %s in %s on %s", settings.model, str(dtype).removeprefix("torch."), chosen)
    model = LanguageModel(bridge, tokenizer, settings, checkpoint)
    model.check()
    if compile_model:
        compile_mlps(bridge)
    return model


def _capture(bridge: Any, points: Mapping[str, Any], hooks: Sequence[str], tokens: Tensor) -> dict[str, Tensor]:
    """Return the activation at each of ``hooks``, (contexts, positions, d), for ``tokens`` (contexts, positions).

    ``points`` maps hook names to hook points. ``HOOK[H]`` is head H's slice of a hook, and d then d_head; otherwise
    heads are flattened into one dimension. The tensors are inference tensors and may be the model's own, or views of
    one another: use them before the next call, or copy them. If a hook fires more than once in a pass, the first
    firing counts.
    """
    wanted = {hook: HookName.parse(hook) for hook in hooks}
    captured = _fired(bridge, points, list(dict.fromkeys(part.point for part in wanted.values())), tokens)
    _check_all_fired([part.point for part in wanted.values()], captured)
    with torch.inference_mode():
        return {hook: _rows(part, captured[part.point], tokens) for hook, part in wanted.items()}


def _count_heads(bridge: Any, points: Mapping[str, Any], hooks: Sequence[str], tokens: Tensor) -> dict[str, int]:
    """Return the number of heads at each of ``hooks``, 0 where one vector per position is held.

    Keys and values have fewer heads than queries where attention is grouped. Hooks that never fire, or hold no
    activation of token positions, are left out: ``capture`` says so.
    """
    counts = {}
    for hook, value in _fired(bridge, points, hooks, tokens).items():
        if isinstance(value, Tensor) and value.ndim > 2 and value.shape[:2] == tokens.shape:
            counts[hook] = value.shape[2] if value.ndim == 4 else 0
    return counts


def _compare_pair(mlp: Callable[[Tensor], Any], inputs: Tensor, outputs: Tensor) -> PairingCheck:
    """Return how ``mlp(inputs)`` compares with ``outputs``, both (contexts, positions, d); errors in float64."""
    computed = computed_output(mlp, inputs, outputs)
    difference = (computed.double() - outputs.double()).abs()
    return PairingCheck(
        applicable=True,
        exact=torch.equal(computed, outputs),
        max_abs_difference=float(difference.max()),
        relative_error=relative_error(float(difference.norm()), float(outputs.double().norm())),
    )


def _fired(bridge: Any, points: Mapping[str, Any], hooks: Sequence[str], tokens: Tensor) -> dict[str, Any]:
    """Run the model until the last of ``hooks`` has fired; return what each of those that did held."""
    # No KV cache: it would be filled and thrown away.
    with torch.inference_mode(), _captured(points, hooks) as captured:
        with explained_failures(tokens.shape[0]), without_padding_advice(), contextlib.suppress(_AllCaptured):
            bridge(tokens, return_type=None, use_cache=False)
        return captured


@contextlib.contextmanager
def _captured(points: Mapping[str, Any], hooks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Fill a dict as ``hooks`` fire, and take the hooks away again whatever happens."""
    captured: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def store(value: Any, *, hook: Any) -> None:  # noqa: ARG001 - TransformerLens passes it by name
            captured.setdefault(name, value)
            if len(captured) == len(hooks):
                raise _AllCaptured

        return store

    try:
        for name in hooks:
            points[name].add_hook(keep(name), level=_HOOK_LEVEL)
        yield captured
    finally:
        for name in hooks:
            points[name].remove_hooks("fwd", level=_HOOK_LEVEL)


@contextlib.contextmanager
def without_padding_advice() -> Iterator[None]:
    """Keep transformers from advising on padding when BOS doubles as padding: contexts here are never padded."""
    advisor = logging.getLogger("transformers.modeling_utils")
    advisor.addFilter(_is_not_about_padding)
    try:
        yield
    finally:
        advisor.removeFilter(_is_not_about_padding)


def _is_not_about_padding(record: logging.LogRecord) -> bool:
    return "attention_mask" not in record.getMessage()


@contextlib.contextmanager
def explained_failures(n_contexts: int) -> Iterator[None]:
    """Say what to do when memory runs out, ``torch.compile`` cannot work, or a family does not run at all."""
    try:
        yield
    except ActionableError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(_smaller_batch(n_contexts)) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ModelError(
                f"torch cannot compile the language model here: {reason}; run without compiling"
            ) from error
        if (library := _library_of(error)) is not None:
            raise ModelError(
                f"the language model fails in {library} {version(library)}: {reason}; its architecture is only half "
                f"supported there, so use another model or another release of {library} (`pipeline --debug …` shows "
                "where)"
            ) from error
        raise


def _library_of(error: Exception) -> str | None:
    """Return which of the two libraries that a model is made of raised an error; None if neither did."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = next((name.partition(".")[0] for name in reversed(modules) if not name.startswith("torch.")), "")
    return raised_in if raised_in in ("transformers", "transformer_lens") else None


def _smaller_batch(n_contexts: int) -> str:
    batch = f"the language model ran out of memory on a batch of {n_contexts} context{'s' if n_contexts > 1 else ''}; "
    if n_contexts > 1:
        return batch + f"try a batch of {n_contexts // 2}"
    return batch + "no batch is smaller: use shorter contexts, a smaller dtype or a device with more memory"


def _check_all_fired(hooks: Sequence[str], captured: Mapping[str, Any]) -> None:
    silent = [hook for hook in dict.fromkeys(hooks) if hook not in captured]
    if silent:
        raise ModelError(
            f"the language model ran to its end and these hooks never fired: {', '.join(silent)}. TransformerLens "
            "leaves some hooks off, hook_mlp_in among them; an MLP's exact input and output are "
            "blocks.L.mlp.hook_in and blocks.L.mlp.hook_out"
        )


def _rows(hook: HookName, value: Any, tokens: Tensor) -> Tensor:
    """Return a captured value as (contexts, positions, d), or say why it is no activation of token positions."""
    if isinstance(value, tuple) and value:
        value = value[0]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"hook {hook.point}: holds {kind}, wanted floating-point activations; choose another hook")
    if value.ndim < 3 or value.shape[:2] != tokens.shape:
        raise ModelError(
            f"hook {hook.point}: holds a tensor of shape {tuple(value.shape)} for {tokens.shape[0]} contexts of "
            f"{tokens.shape[1]} positions; wanted one vector per position, or one per head and position"
        )
    if hook.head is not None:
        problem = head_problem(hook, value.shape[2] if value.ndim == 4 else 0)
        if problem is not None:
            raise ModelError(f"hook {problem}")
        return value[:, :, hook.head]
    return value.flatten(2) if value.ndim > 3 else value
