"""Which hooks of a language model make a site: ``layer 8`` or names given by the user, checked against the model.

A layer means ``blocks.L.mlp.hook_in`` and ``blocks.L.mlp.hook_out``, the exact input and output of the MLP in every
model family. The older names mean other things: ``ln2.hook_normalized`` is taken before the norm's gain and bias,
and ``hook_mlp_out`` comes after a further norm where a family has one.

Wherever a hook is named, ``blocks.3.attn.hook_z[5]`` means one head's slice of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from tailrace.storage.cache_format import HookName, Site
from tailrace.storage.errors import ModelError
from tailrace.storage.layout import Side

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LAYER_ITEM = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")
_MLP_HOOK = re.compile(r"blocks\.(\d+)\.mlp\.hook_(?:in|out)")

HeadCounts = Callable[[Sequence[str]], Mapping[str, int]]
"""Hook points → how many heads each holds, 0 where it holds one vector per position; leaves out those that do not
hold activations of token positions, about which capturing them has more to say."""


class SiteHooks(NamedTuple):
    """One site: its name, safe as a folder name, and the hooks of its input and its output."""

    name: str
    hook_in: str
    hook_out: str

    @classmethod
    def of(cls, site: Site) -> SiteHooks:
        """Return the hooks of a recorded site."""
        return cls(site.name, site.hook_in, site.hook_out)

    @property
    def sides(self) -> dict[Side, str]:
        """The hook of each side that is stored: one side where both hooks are the same."""
        return {"in": self.hook_in} if self.hook_in == self.hook_out else {"in": self.hook_in, "out": self.hook_out}

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
    layers: str | None,
    hooks: Sequence[str],
    *,
    n_layers: int,
    hook_names: Collection[str],
    count_heads: HeadCounts,
) -> list[SiteHooks]:
    """Return the sites of ``layers`` (``"0,3,8-11"`` or ``"all"``) followed by those of ``hooks``.

    Each of ``hooks`` is ``HOOK`` (input and output are the same, as for a sparse autoencoder) or ``IN:OUT``, either
    one optionally with a name, ``NAME=IN:OUT``; a hook may be one head's slice, ``HOOK[H]``. ``count_heads`` is asked
    only about hooks of which a head is wanted. Raises ModelError that lists every problem at once.
    """
    problems: list[str] = []
    sites = [layer_site(layer) for layer in _parse_layers(layers or "", n_layers, problems)]
    sites += [site for text in hooks if (site := _parse_hooks(text, problems)) is not None]
    if not sites and not problems:
        problems.append(
            "no layer and no hook is given; use --layers, such as --layers 0 (the model has layers 0 to "
            f"{n_layers - 1}), or --hooks"
        )
    without_mlp = [site for site in sites if site.default_layer is not None and _has_no_mlp(site, hook_names)]
    problems += _blocks_without_mlp(without_mlp, hook_names)
    for site in sites:
        problems += [] if site in without_mlp else _unknown_hooks(site, hook_names)
    problems += _unknown_heads(sites, hook_names, count_heads)
    problems += _repeated(sites)
    if problems:
        raise ModelError(listed(problems))
    return sites


def listed(problems: Sequence[str]) -> str:
    """Return problems of the sites asked for as one message."""
    return "\n  ".join([_count(problems), *problems])


def head_problem(hook: HookName, n_heads: int) -> str | None:
    """Return what is wrong with asking for a hook's head where the hook has ``n_heads``; None if nothing is."""
    if hook.head is None or 0 <= hook.head < n_heads:
        return None
    if n_heads == 0:
        return (
            f"{hook}: this hook has no heads, it holds one vector per position; leave out [{hook.head}]. "
            "Heads are at blocks.L.attn.hook_z, hook_q, hook_k and hook_v"
        )
    return f"{hook}: this hook has {n_heads} head{'s' if n_heads > 1 else ''}, 0 to {n_heads - 1}"


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
    hook_in, hook_out = HookName.parse(parts[0]), HookName.parse(parts[-1])
    wrong = [part.point for part in dict.fromkeys((hook_in, hook_out)) if re.search(r"[\[\]]", part.point)]
    if wrong:
        problems += [
            f"hooks {text!r}: {hook!r} is not understood; brackets hold the number of one head, such as "
            "blocks.0.attn.hook_z[5]"
            for hook in wrong
        ]
        return None
    site = SiteHooks(name.strip() if equals else _default_name(hook_in, hook_out), str(hook_in), str(hook_out))
    if not _SAFE_NAME.fullmatch(site.name):
        problems.append(
            f"hooks {text!r}: the name {site.name!r} will be a folder name; use up to 128 letters, digits, '.', '_' "
            "or '-', beginning with a letter or digit"
        )
    return site


def _default_name(hook_in: HookName, hook_out: HookName) -> str:
    layer = SiteHooks("", str(hook_in), str(hook_out)).default_layer
    if layer is not None:
        return f"layer{layer}"
    name_in, name_out = _without_brackets(hook_in), _without_brackets(hook_out)
    return name_in if hook_in == hook_out else f"{name_in}-to-{name_out}"


def _without_brackets(hook: HookName) -> str:
    """Return a hook's name as part of a folder's: shells and file name patterns take brackets for something else."""
    return hook.point if hook.head is None else f"{hook.point}.head{hook.head}"


def _has_no_mlp(site: SiteHooks, hook_names: Collection[str]) -> bool:
    return site.hook_in not in hook_names and site.hook_out not in hook_names


def _blocks_without_mlp(sites: Sequence[SiteHooks], hook_names: Collection[str]) -> list[str]:
    """Return a sentence about all ``sites``, layers of which the model's blocks have no MLP under the usual names."""
    if not sites:
        return []
    layers = ", ".join(str(site.default_layer) for site in sites)
    own = sorted({layer for hook in hook_names if (match := _MLP_HOOK.fullmatch(hook)) for layer in [int(match[1])]})
    near = difflib.get_close_matches(sites[0].hook_out, hook_names, n=4, cutoff=0.6)
    advice = (
        f"layers with one are {', '.join(map(str, own))}"
        if own
        else "name what is to be cached with --hooks" + (f", near matches: {', '.join(near)}" if near else "")
    )
    return [
        f"layer{'s' if sites[1:] else ''} {layers}: no MLP of its own in this model (such blocks are Mamba's, "
        f"recurrent, or built otherwise), so {sites[0].hook_in} and {sites[0].hook_out} are not there; {advice}"
    ]


def _unknown_hooks(site: SiteHooks, hook_names: Collection[str]) -> list[str]:
    problems = []
    for hook in dict.fromkeys(HookName.parse(name).point for name in (site.hook_in, site.hook_out)):
        if hook in hook_names:
            continue
        near = difflib.get_close_matches(hook, hook_names, n=4, cutoff=0.6)
        advice = f"near matches: {', '.join(near)}" if near else "names look like blocks.0.mlp.hook_out"
        problems.append(f"site {site.name}: this model has no hook {hook!r}; {advice}")
    return problems


def _unknown_heads(sites: Sequence[SiteHooks], hook_names: Collection[str], count_heads: HeadCounts) -> list[str]:
    asked = {
        (site.name, part): None
        for site in sites
        for part in map(HookName.parse, (site.hook_in, site.hook_out))
        if part.head is not None and part.point in hook_names
    }
    if not asked:
        return []
    counts = count_heads(list(dict.fromkeys(part.point for _, part in asked)))
    problems = [(name, head_problem(part, counts[part.point])) for name, part in asked if part.point in counts]
    return [f"site {name}: {problem}" for name, problem in problems if problem is not None]


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
