"""Run a language model with something else in place of what chosen sites compute.

A site is a pair of hooks. What passes its input hook is read, what passes its output hook is replaced, and everything
after sees the replaced value. The model's own computation still runs, so a substitute may look at its result (to
measure an error, or to leave it alone). Nothing of the model is swapped or changed: hooks are added on entering and
these same hooks are taken away on leaving, so nesting in any order of sites restores exactly what was there before.

Position 0 keeps the model's own value unless asked otherwise: it holds the BOS, whose activations are hundreds of
times larger than any other and which caches leave out, so a transcoder has never seen it. A position is a token's place
in its sequence, not in the pass: a token generated with a key-value cache has a pass to itself and is no BOS.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from tailrace.analysis.splice.hook_points import HookFunction, hooked, name_problem
from tailrace.analysis.splice.passes import Passes, PassTokens, check_whole, following_passes
from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import ModelError
from tailrace.training.cross_layer.layers import StackedLayer

EVERY_POSITION = torch.ones(1, 1, dtype=torch.bool)
"""For ``where``: replace at all positions, the BOS included."""


class Substitute(ABC):
    """What stands in for a site's own computation."""

    @abstractmethod
    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return what goes on instead of ``outputs``, same shape and dtype.

        ``inputs`` (contexts, positions, d_in) is what the site reads, ``outputs`` (contexts, positions, d_out) what
        the model itself makes of it; both belong to the model and must not be written to.
        """

    def in_pass(self, inputs: Tensor, outputs: Tensor, tokens: PassTokens) -> Tensor:  # noqa: ARG002
        """Return what a call gives, for one that does not depend on which ``tokens`` of their sequences these are."""
        return self(inputs, outputs)

    def problems(self, site: Site) -> list[str]:  # noqa: ARG002
        """Return a sentence for everything that makes it unfit for ``site``."""
        return []

    def others(self) -> Mapping[Site, Substitute | None]:
        """Return the sites that have to be replaced with this, and by what; None where that has to be given too."""
        return {}


class Transcoded(Substitute):
    """The output of a transcoder: any function from (…, d_in) to (…, d_out).

    A module computes in the dtype of its own weights, whatever the model's; the result is rounded to the model's.
    """

    def __init__(self, transcoder: Callable[[Tensor], Tensor]) -> None:
        self.transcoder = transcoder

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the transcoder's outputs."""
        return self._transcoded(inputs, None).to(outputs.dtype)

    def in_pass(self, inputs: Tensor, outputs: Tensor, tokens: PassTokens) -> Tensor:
        """Return the same; of a layer of a cross-layer transcoder, with what earlier layers write to it."""
        return self._transcoded(inputs, tokens).to(outputs.dtype)

    def problems(self, site: Site) -> list[str]:
        """Return a sentence for every width that differs, where the transcoder says its widths."""
        return width_problems(self.transcoder, site)

    def others(self) -> Mapping[Site, Substitute | None]:
        """Return the other layers of a cross-layer transcoder."""
        return other_layers(self.transcoder)

    def _transcoded(self, inputs: Tensor, tokens: PassTokens | None) -> Tensor:
        rows = inputs.to(weights_dtype(self.transcoder, inputs.dtype))
        if isinstance(self.transcoder, StackedLayer):
            return decode_in_pass(self.transcoder, self.transcoder.encode(rows), rows, tokens)
        return self.transcoder(rows)


class ZeroAblated(Substitute):
    """Zeros."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:  # noqa: ARG002
        """Return zeros."""
        return torch.zeros_like(outputs)


class MeanAblated(Substitute):
    """The same vector everywhere: ``mean`` (d_out,), usually the mean output over a cache's training rows."""

    def __init__(self, mean: NDArray[np.floating] | Tensor) -> None:
        self.mean = torch.as_tensor(mean).detach().clone()

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mean at every position."""
        return self.mean.to(outputs.device, outputs.dtype).expand_as(outputs)

    def problems(self, site: Site) -> list[str]:
        """Return a sentence if the mean is no vector of the site's width."""
        if tuple(self.mean.shape) == (site.d_out,):
            return []
        return [f"the mean has shape {tuple(self.mean.shape)}, wanted ({site.d_out},)"]


class Unchanged(Substitute):
    """The model's own output."""

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``outputs``."""
        return outputs


class Replacement:
    """What is replaced inside a ``replaced`` context."""

    def __init__(self, splices: Sequence[_Splice]) -> None:
        self._splices = splices

    def silent_sites(self) -> list[str]:
        """Return the names of the sites whose output hook has not fired yet: nothing was replaced there."""
        return [splice.site.name for splice in self._splices if splice.n_firings == 0]


@contextlib.contextmanager
def replaced(
    bridge: Any, substitutes: Mapping[Site, Substitute], *, where: Tensor | None = None
) -> Iterator[Replacement]:
    """Replace the outputs of sites of a TransformerLens ``bridge`` for every forward pass inside.

    ``where`` is a bool tensor that can be expanded to (contexts, positions): True where outputs are replaced,
    everywhere but at each sequence's first token by default. For generated text it needs a column for every token, the
    new ones too, or one column for all. Raises ModelError, listing every problem, for a hook that the model does not
    have, a substitute of another width, two sites that write to the same place, and a layer of a cross-layer
    transcoder without its others. In a nested context the inner one
    acts on what the outer one left, so of two substitutes for one site the inner one counts.
    """
    points: Mapping[str, Any] = bridge.hook_dict
    substitutes, problems = _completed(substitutes)
    problems += _site_problems(substitutes, points)
    if problems:
        raise ModelError("cannot replace what was asked for:\n" + "\n".join(f"  {line}" for line in problems))
    with following_passes(bridge) as passes:
        splices = [_Splice(site, substitute, points, where, passes) for site, substitute in substitutes.items()]
        # At a point where one site writes and another reads, the reader sees what was written.
        functions = [(splice.point_out, splice.write) for splice in splices]
        functions += [(splice.point_in, splice.read) for splice in splices if not splice.reads_what_it_writes]
        with hooked(functions):
            yield Replacement(splices)


def run_replaced(
    bridge: Any, tokens: Tensor, substitutes: Mapping[Site, Substitute], where: Tensor | None = None
) -> Tensor:
    """Return the logits (contexts, positions, vocab) of ``tokens`` with ``substitutes`` in place, as ``replaced`` does.

    Raises ModelError if an output hook never fired: nothing would have been replaced there.
    """
    check_whole(where, tokens)
    with replaced(bridge, substitutes, where=where) as replacement:
        on_model = tokens.to(next(bridge.original_model.parameters()).device)
        logits: Tensor = bridge(on_model, return_type="logits", use_cache=False)
    if silent := replacement.silent_sites():
        raise ModelError(silent_sites_problem(silent))
    return logits


def silent_sites_problem(sites: Sequence[str]) -> str:
    """Return a sentence about sites, by name, where nothing was replaced because their output hooks never fired."""
    return (
        f"sites {', '.join(sites)}: their output hooks never fired, so nothing was replaced; TransformerLens "
        "leaves some hooks off. Cache the MLP's own blocks.L.mlp.hook_in and blocks.L.mlp.hook_out"
    )


def weights_dtype(transcoder: object, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a module's weights, ``default`` for a function or a module without any."""
    weights = next(transcoder.parameters(), None) if isinstance(transcoder, nn.Module) else None
    return default if weights is None else weights.dtype


def width_problems(transcoder: object, site: Site) -> list[str]:
    """Return a sentence for every width of ``transcoder`` that is not the site's, and for another layer's."""
    if isinstance(transcoder, StackedLayer) and (own := transcoder.sites[transcoder.index]).hook_out != site.hook_out:
        return [f"the layer of a cross-layer transcoder that stands in for {own.hook_out}, not for {site.hook_out}"]
    pairs = [(name, getattr(transcoder, name, None), getattr(site, name)) for name in ("d_in", "d_out")]
    return [
        f"the transcoder has {name} {own}, the site {wanted}"
        for name, own, wanted in pairs
        if isinstance(own, int) and own != wanted
    ]


class InPlaceCoder(Protocol):
    """The part of a transcoder that standing in for an MLP needs."""

    def encode(self, inputs: Tensor, /) -> Tensor:
        """Return activations (rows, d_sae) of inputs (rows, d_in)."""
        ...

    def decode(self, activations: Tensor, inputs: Tensor, /) -> Tensor:
        """Return outputs (rows, d_out); the inputs are for transcoders with a path past the features."""
        ...


def decode_in_pass(coder: InPlaceCoder, activations: Tensor, rows: Tensor, tokens: PassTokens | None) -> Tensor:
    """Return outputs (…, d_out) of activations (…, d_sae) of ``rows`` (…, d_in).

    To those of a layer of a cross-layer transcoder, the features of all earlier layers write too, by their activations
    in the same pass. Raises ModelError if these are not known.
    """
    if not isinstance(coder, StackedLayer):
        return coder.decode(activations, rows)
    written = {} if tokens is None else tokens.written
    earlier = _remembered(written, (coder.stack, "activations"), coder, activations)
    missing = [coder.sites[index].name for index in range(coder.index) if index not in earlier]
    if missing or any(values.shape[:-1] != activations.shape[:-1] for _, values in earlier.values()):
        raise ModelError(
            f"{coder.sites[coder.index].name} of a cross-layer transcoder was asked for before "
            f"{', '.join(missing) or 'earlier layers'} were read on the same rows; put all its layers in place"
        )
    outputs = coder.b_dec_out.expand(*activations.shape[:-1], -1)
    for layer, values in earlier.values():
        outputs = outputs + values @ layer.writes_to(coder.index)
    return torch.add(outputs, activations @ coder.W_dec)


def change_in_pass(coder: Any, change: Tensor, tokens: PassTokens | None) -> Tensor:
    """Return what a change (…, d_sae) of activations adds to outputs (…, d_out).

    Changes at earlier layers of the same cross-layer transcoder, in the same pass, are added as well.
    """
    added: Tensor = change @ coder.W_dec
    if isinstance(coder, StackedLayer):
        written = {} if tokens is None else tokens.written
        for layer, values in _remembered(written, (coder.stack, "changes"), coder, change).values():
            added = added + values @ layer.writes_to(coder.index)
    return added


class ChangedByEarlier(Substitute):
    """The model's own outputs of a later layer of a cross-layer transcoder, and what ``change_in_pass`` adds there."""

    def __init__(self, layer: StackedLayer, target: int) -> None:
        self._stack, self._target = layer.stack, target

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``outputs``: without a pass, nothing is known of earlier layers."""
        return outputs

    def in_pass(self, inputs: Tensor, outputs: Tensor, tokens: PassTokens) -> Tensor:  # noqa: ARG002
        """Return the outputs with every change that earlier layers made in this pass."""
        for layer, change in tokens.written.get((self._stack, "changes"), {}).values():
            outputs = outputs + (change @ layer.writes_to(self._target)).to(outputs.dtype)
        return outputs


def other_layers(coder: object) -> dict[Site, Substitute | None]:
    """Return the sites of the layers that a layer of a cross-layer transcoder stands in together with."""
    if not isinstance(coder, StackedLayer):
        return {}
    return {site: None for index, site in enumerate(coder.sites) if index != coder.index}


def _remembered(
    written: dict[Any, Any], key: Hashable, layer: StackedLayer, values: Tensor
) -> dict[int, tuple[StackedLayer, Tensor]]:
    """Return what earlier layers left in this pass, by index, and leave this one's for later ones."""
    known: dict[int, tuple[StackedLayer, Tensor]] = written.setdefault(key, {})
    earlier = {index: known[index] for index in sorted(known) if index < layer.index}
    known[layer.index] = (layer, values)
    if not layer.later:
        del written[key]  # no one reads them any more, and logits, which come next, are large too
    return earlier


def _completed(substitutes: Mapping[Site, Substitute]) -> tuple[dict[Site, Substitute], list[str]]:
    """Return ``substitutes`` and what they bring along for other sites, and a sentence for each that is missing."""
    completed = dict(substitutes)
    problems = []
    for site, substitute in substitutes.items():
        hooks = {one.hook_out for one in completed}
        others = {other: own for other, own in substitute.others().items() if other.hook_out not in hooks}
        completed |= {other: own for other, own in others.items() if own is not None}
        if missing := [other.name for other, own in others.items() if own is None]:
            problems.append(
                f"site {site.name}: is a layer of a cross-layer transcoder, which stands in for all its layers "
                f"together; put {', '.join(missing)} in place too"
            )
    return completed, problems


def _site_problems(substitutes: Mapping[Site, Substitute], points: Mapping[str, Any]) -> list[str]:
    problems = []
    written: list[tuple[Site, int, int | None]] = []
    for site, substitute in substitutes.items():
        names = dict.fromkeys((site.hook_in, site.hook_out))
        unknown = [problem for name in names if (problem := name_problem(name, points)) is not None]
        problems += [f"site {site.name}: {problem}" for problem in [*unknown, *substitute.problems(site)]]
        if not unknown:
            address = HookName.parse(site.hook_out)
            place = (id(points[address.point]), address.head)
            for other, point, head in written:
                if point == place[0] and (head == place[1] or None in (head, place[1])):
                    problems.append(
                        f"site {site.name}: writes to {site.hook_out}, which site {other.name} replaces too; choose one"
                    )
            written.append((site, *place))
    return problems


class _Splice:
    """One site while it is replaced: its input on the way from one hook to the other."""

    def __init__(
        self, site: Site, substitute: Substitute, points: Mapping[str, Any], where: Tensor | None, passes: Passes
    ) -> None:
        self.site = site
        self.n_firings = 0
        self._substitute, self._where, self._passes = substitute, where, passes
        self._in, self._out = HookName.parse(site.hook_in), HookName.parse(site.hook_out)
        self.point_in, self.point_out = points[self._in.point], points[self._out.point]
        self._inputs: Tensor | None = None

    @property
    def reads_what_it_writes(self) -> bool:
        """Whether one hook function can do both, as for an autoencoder."""
        return self.point_in is self.point_out and self._in.head == self._out.head

    @property
    def read(self) -> HookFunction:
        """Remember the site's input."""

        def remember(value: Any, *, hook: Any) -> None:  # noqa: ARG001 - TransformerLens passes it by name
            self._inputs = self._slice(tensor_in(value), self._in, self.site.hook_in, self.site.d_in)

        return remember

    @property
    def write(self) -> HookFunction:
        """Put the substitute's output in the place of the model's."""

        def replace(value: Any, *, hook: Any) -> Any:  # noqa: ARG001
            whole = tensor_in(value)
            own = self._slice(whole, self._out, self.site.hook_out, self.site.d_out)
            tokens = self._passes.tokens(own)
            new = self._substitute.in_pass(self._take_inputs(own), own, tokens)
            if new.shape != own.shape or new.dtype != own.dtype:
                raise ModelError(
                    f"site {self.site.name}: the substitute gave {new.dtype} of shape {tuple(new.shape)}, wanted "
                    f"{own.dtype} of shape {tuple(own.shape)}"
                )
            self.n_firings += 1
            whole = self._put(whole, torch.where(self._mask(tokens), new, own))
            return (whole, *value[1:]) if isinstance(value, tuple) else whole

        return replace

    def _take_inputs(self, own: Tensor) -> Tensor:
        if self.reads_what_it_writes:
            return own
        inputs, self._inputs = self._inputs, None
        if inputs is None or inputs.shape[:2] != own.shape[:2]:
            raise ModelError(
                f"site {self.site.name}: {self.site.hook_out} fired and {self.site.hook_in} had not fired before it "
                "in this pass; a site's input must come before its output"
            )
        return inputs

    def _slice(self, value: Tensor, address: HookName, name: str, width: int) -> Tensor:
        """Return (contexts, positions, width): one head, or all of them side by side as a cache keeps them."""
        if address.head is None:
            rows = rearrange(value, "contexts positions ... -> contexts positions (...)") if value.ndim > 3 else value
        elif value.ndim == 4 and address.head < value.shape[2]:
            rows = value[:, :, address.head]
        else:
            raise ModelError(
                f"site {self.site.name}: {name} holds a tensor of shape {tuple(value.shape)}; wanted (contexts, "
                f"positions, heads, width) with more than {address.head} heads"
            )
        if rows.ndim != 3 or rows.shape[2] != width:
            raise ModelError(
                f"site {self.site.name}: {name} holds a tensor of shape {tuple(value.shape)}; wanted {width} numbers "
                "per position. The site belongs to another model"
            )
        return rows

    def _put(self, whole: Tensor, new: Tensor) -> Tensor:
        if self._out.head is None:
            return new.reshape(whole.shape)
        # A copy: the tensor may be somebody else's, such as a cache's or the residual stream's.
        whole = whole.clone()
        whole[:, :, self._out.head] = new
        return whole

    def _mask(self, tokens: PassTokens) -> Tensor:
        """Return where to replace, (contexts, positions, 1)."""
        if self._where is None:
            return tokens.after_bos()[..., None]
        return tokens.part(self._where, f"site {self.site.name}")[..., None]


def tensor_in(value: Any) -> Tensor:
    """Return the activation that a hook holds: attention hooks of some families hold a tuple that begins with it.

    Raises ModelError if the hook holds anything but floating-point numbers.
    """
    tensor = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ModelError(f"a hook holds {type(tensor).__name__}, wanted floating-point activations; choose another")
    return tensor
