"""Steered texts as a file: an HTML page that needs nothing else and no script, Parquet, or JSON.

A text is faint as far as it is the model's own, so that a reader sees where it leaves it; what is counted is marked.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tailrace.pipeline.steer.settings import check_output
from tailrace.pipeline.steer.stage import SCHEMA, SteeredText, SteerResult
from tailrace.pipeline.steer.text import as_json, number_rows
from tailrace.storage.artifact import make_directory, write_atomically
from tailrace.storage.tables import write_table

SHOWN_PROMPTS = 200
"""Prompts on a page; Parquet and JSON have all."""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #5b6470; --line: #d5dae1; --panel: #f5f7f9;
  --mark: #ffd54d; --changed: #1f6f43; --random: #6b7280; --own: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8ebef; --faint: #a4adb8; --line: #333a43;
  --panel: #1c2127; --mark: #7a5f00; --changed: #6cc496; --random: #9aa3ae; --own: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 92rem; padding: 1rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0; }
p, dl { margin: 0 0 .5rem; }
.note, dd { color: var(--faint); }
dt { font-weight: 600; }
dd { margin: 0 0 .35rem; }
.scrolls { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; font-weight: 400; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; white-space: pre-wrap; min-width: 9rem; overflow-wrap: anywhere; }
thead th { color: var(--faint); vertical-align: bottom; }
.texts { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
article, details { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; background: var(--panel); }
details { margin-top: .75rem; }
details article { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .5rem 0; }
summary { cursor: pointer; }
:focus-visible { outline: 3px solid var(--changed); outline-offset: 2px; }
.text { white-space: pre-wrap; margin: .35rem 0 0; }
.same { color: var(--faint); }
mark { background: var(--mark); color: inherit; }
svg { display: block; width: 100%; max-width: 46rem; height: auto; margin: .75rem 0; }
svg text { fill: var(--ink); font-size: 13px; }
svg .axis { stroke: var(--line); }
svg .random { fill: var(--random); fill-opacity: .55; }
svg .own { fill: var(--own); }
""".strip()


def write_result(path: Path, result: SteerResult) -> None:
    """Write ``result`` as the ending of ``path`` says. Raises SettingsError, or StorageFull."""
    check_output(path)
    make_directory(path.absolute().parent)
    match path.suffix.lower():
        case ".parquet":
            write_table(path, SCHEMA, result.table().to_batches())
        case ".json":
            write_atomically(path, (json.dumps(as_json(result), indent=1, ensure_ascii=False) + "\n").encode())
        case _:
            write_atomically(path, page(result).encode())


def page(result: SteerResult) -> str:
    """Return a page with the numbers of every run, and of each prompt the texts beside each other."""
    runs = result.runs[1:]
    title = f"Steered: {runs[0]}" + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f'img-src data:"><link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>\n{_STYLE}\n</style>'
        f"</head><body><main><h1>{html.escape(title)}</h1>"
    ]
    if result.about:
        notes = "".join(
            f"<dt>Feature {html.escape(name)}</dt><dd>{html.escape(_printable(note))}</dd>"
            for name, note in result.about.items()
        )
        parts.append(f"<dl>{notes}</dl>")
    parts += _numbers(result)
    parts += itertools.chain.from_iterable(_prompt(result, n) for n in range(len(result.prompts))[:SHOWN_PROMPTS])
    if len(result.prompts) > SHOWN_PROMPTS:
        parts.append(f'<p class="note">{len(result.prompts) - SHOWN_PROMPTS} more prompts are in Parquet and JSON.</p>')
    return "".join([*parts, "</main></body></html>\n"])


def _numbers(result: SteerResult) -> Iterator[str]:
    """Yield the table of runs, and a picture of random features beside them."""
    heading, *rows = number_rows(result)
    yield '<div class="scrolls" tabindex="0" role="region" aria-label="Numbers of each run"><table><thead><tr>'
    yield f"<td></td>{''.join(f'<th scope=col>{html.escape(cell)}</th>' for cell in heading[1:])}</tr></thead><tbody>"
    for label, *cells in rows:
        shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        yield f'<tr><th scope="row">{html.escape(label)}</th>{shown}</tr>'
    yield "</tbody></table></div>"
    yield (
        '<p class="note">KL(model ‖ changed) and the share of next tokens whose likeliest is another are means along '
        "the text that the model writes by itself.</p>"
    )
    if result.n_draws:
        yield _picture(result)
        yield (
            f'<p class="note">Red: the features asked for. Grey: {result.n_draws} draws of other features that are as '
            "often active, with the same strength times decoder norm.</p>"
        )


def _picture(result: SteerResult) -> str:
    """Return the KL of every run, a row each, with a grey dot for each draw of random features."""
    rows = [
        (label, result.summary(n).kl, [one.kl for one in result.draws(n)]) for n, label in enumerate(result.runs) if n
    ]
    largest = max([kl for _, own, draws in rows for kl in (own, *draws) if kl is not None], default=0.0) or 1.0
    left, width, step = 10, 580, 44
    height = step * len(rows) + 26
    parts = [f'<svg viewBox="0 0 {width + 2 * left} {height}" role="img" aria-label="KL of each run beside random">']
    for number, (label, own, draws) in enumerate(rows):
        y = number * step + 30
        parts.append(f'<text x="{left}" y="{y - 14}">{html.escape(_short(label))}</text>')
        parts.append(f'<line class="axis" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>')
        for kind, values in (("random", draws), ("own", [own])):
            parts += [
                f'<circle class="{kind}" cx="{left + width * kl / largest:.1f}" cy="{y}" r="5"/>'
                for kl in values
                if kl is not None
            ]
    parts.append(f'<text x="{left}" y="{height - 4}">0</text>')
    parts.append(f'<text x="{left + width}" y="{height - 4}" text-anchor="end">{largest:.3g} nats</text></svg>')
    return "".join(parts)


def _prompt(result: SteerResult, prompt: int) -> Iterator[str]:
    texts = [one for one in result.texts if one.prompt == prompt]
    own = result.of(prompt, 0)
    yield f'<section><h2 dir="auto">{html.escape(_printable(result.prompts[prompt]))}</h2><div class="texts">'
    for one in texts:
        if one.draw is None:
            yield _article(result, one, own, result.runs[one.run])
    yield "</div>"
    if result.n_draws:
        yield f"<details><summary>Random features ({result.n_draws} draws)</summary>"
        for one in texts:
            if one.draw is not None:
                yield _article(result, one, own, f"{one.features}, for {result.runs[one.run]}")
        yield "</details>"
    yield "</section>"


def _article(result: SteerResult, one: SteeredText, own: SteeredText, label: str) -> str:
    effect = one.effect
    about = "" if effect is None or not effect.n_tokens else f"KL {effect.kl / effect.n_tokens:.3g}"
    note = f'<p class="note">{about}</p>' if about else ""
    shown = _marked(one, own, result.count)
    return f'<article><h3>{html.escape(label)}</h3>{note}<p class="text" dir="auto">{shown}</p></article>'


def _marked(one: SteeredText, own: SteeredText, count: str | None) -> str:
    """Return a text with its part that is the model's own faint, and what is counted marked."""
    is_own = one.run == 0
    n_same = 0 if is_own else len(_common(one, own))
    text = one.text
    found = [False] * len(text)
    for match in re.finditer(count, text) if count else ():
        found[match.start() : match.end()] = [True] * (match.end() - match.start())
    places = itertools.groupby(range(len(text)), key=lambda at: (at < n_same, found[at]))
    parts = []
    for (is_same, is_counted), group in places:
        part = html.escape(_printable("".join(text[at] for at in group)))
        part = f"<mark>{part}</mark>" if is_counted else part
        parts.append(f'<span class="same">{part}</span>' if is_same else part)
    return "".join(parts)


def _common(one: SteeredText, other: SteeredText) -> str:
    """Return the text of the tokens that two texts begin with."""
    pairs = zip(one.tokens, one.token_ids, other.token_ids, strict=False)
    return "".join(token for token, *_ in itertools.takewhile(lambda both: both[1] == both[2], pairs))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)


def _short(label: str, length: int = 80) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"
