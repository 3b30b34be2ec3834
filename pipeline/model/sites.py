"""Which hooks of a language model make a site: ``layer 8`` or names given by the user, checked against the model.

A layer means ``blocks.L.mlp.hook_in`` and ``blocks.L.mlp.hook_out``, the exact input and output of the MLP in every
model family. The older names mean other things: ``ln2.hook_normalized`` is taken before the norm's gain and bias,
and ``hook_mlp_out`` comes after a further norm where a family has one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from storage.errors import ModelError

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LAYER_ITEM = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_MLP_HOOK = re.compile(r"blocks\.(\d+)\.mlp\.hook_(?:in|out)")


class SiteHooks(NamedTuple):
    """One site: its name, safe as a folder name, and the hooks of its input and its output."""

    name: str
    hook_in: str
    hook_out: str

    @property
    def default_layer(self) -> int | None:
        """The layer whose MLP's own input and output this site holds; None for any other pair of hooks."""
        match = _MLP_HOOK.fullmatch(self.hook_in)
        if match is None or self != layer_site(int(match[1]))._replace(name=self.name):
            return None
        return int(match[1])


def layer_site(layer: int) -> SiteHooks:
    """Return the site of one layer's MLP."""
    return SiteHooks(f"layer{layer}", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.mlp.hook_out")


def resolve_sites(
    layers: str | None, hooks: Sequence[str], *, n_layers: int, hook_names: Collection[str]
) -> list[SiteHooks]:
    """Return the sites of ``layers`` (``"0,3,8-11"`` or ``"all"``) followed by those of ``hooks``.

    Each of ``hooks`` is ``HOOK`` (input and output are the same, as for a sparse autoencoder) or ``IN:OUT``, either
    one optionally with a name, ``NAME=IN:OUT``. Raises ModelError that lists every problem at once.
    """
    problems: list[str] = []
    sites = [layer_site(layer) for layer in _parse_layers(layers or "", n_layers, problems)]
    sites += [site for text in hooks if (site := _parse_hooks(text, problems)) is not None]
    if not sites and not problems:
        problems.append(
            f"no site is asked for; give layers such as --layers 0 (the model has layers 0 to {n_layers - 1}), or hooks"
        )
    for site in sites:
        problems += _unknown_hooks(site, hook_names)
    problems += _repeated(sites)
    if problems:
        raise ModelError("\n  ".join([_count(problems), *problems]))
    return sites


def _parse_layers(text: str, n_layers: int, problems: list[str]) -> list[int]:
    if text.strip().lower() == "all":
        return list(range(n_layers))
    chosen: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _LAYER_ITEM.fullmatch(item)
        if match is None:
            problems.append(f"layers {item!r}: write numbers and ranges such as 0,3,8-11, or all")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            problems.append(f"layers {item!r}: the range runs backwards; write {last}-{first}")
        elif last >= n_layers:
            problems.append(f"layers {item!r}: this model has {n_layers} layers, 0 to {n_layers - 1}")
        else:
            chosen.extend(range(first, last + 1))
    return chosen


def _parse_hooks(text: str, problems: list[str]) -> SiteHooks | None:
    name, equals, pair = text.rpartition("=")
    parts = [part.strip() for part in pair.split(":")]
    if len(parts) > 2 or not all(parts):
        problems.append(f"hooks {text!r}: write IN_HOOK:OUT_HOOK, one HOOK, or NAME=IN_HOOK:OUT_HOOK")
        return None
    hook_in, hook_out = parts[0], parts[-1]
    site = SiteHooks(name.strip() if equals else _default_name(hook_in, hook_out), hook_in, hook_out)
    if not _SAFE_NAME.fullmatch(site.name):
        problems.append(
            f"hooks {text!r}: the name {site.name!r} will be a folder name; use up to 128 letters, digits, '.', '_' "
            "or '-', beginning with a letter or digit"
        )
    return site


def _default_name(hook_in: str, hook_out: str) -> str:
    layer = SiteHooks("", hook_in, hook_out).default_layer
    if layer is not None:
        return f"layer{layer}"
    return hook_in if hook_in == hook_out else f"{hook_in}-to-{hook_out}"


def _unknown_hooks(site: SiteHooks, hook_names: Collection[str]) -> list[str]:
    problems = []
    for hook in dict.fromkeys((site.hook_in, site.hook_out)):
        if hook in hook_names:
            continue
        near = difflib.get_close_matches(hook, hook_names, n=4, cutoff=0.6)
        advice = f"near matches: {', '.join(near)}" if near else "names look like blocks.0.mlp.hook_out"
        problems.append(f"site {site.name}: this model has no hook {hook!r}; {advice}")
    return problems


def _repeated(sites: Sequence[SiteHooks]) -> list[str]:
    problems = []
    names: dict[str, SiteHooks] = {}
    pairs: dict[tuple[str, str], SiteHooks] = {}
    for site in sites:
        # Case is ignored because two folders whose names differ only in case are one on some file systems.
        if site.name.casefold() in names:
            problems.append(f"site {site.name}: two sites have this name; leave one out, or name it: NAME=IN:OUT")
        elif (site.hook_in, site.hook_out) in pairs:
            first = pairs[site.hook_in, site.hook_out].name
            problems.append(f"site {site.name}: has the same hooks as site {first}; leave one out")
        names.setdefault(site.name.casefold(), site)
        pairs.setdefault((site.hook_in, site.hook_out), site)
    return problems


def _count(problems: Sequence[str]) -> str:
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the sites asked for:"
