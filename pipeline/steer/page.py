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

from tailrace.pipeline.score.text import note
from tailrace.pipeline.shared.pages import html_page
from tailrace.pipeline.steer.settings import check_output
from tailrace.pipeline.steer.stage import SCHEMA, SteeredText, SteerResult
from tailrace.pipeline.steer.text import json_of, number_rows
from tailrace.storage.artifact import make_directory, write_output
from tailrace.storage.tables import write_table

SHOWN_PROMPTS = 200
"""Prompts on a page; Parquet and JSON have all."""

_STYLE = """
dl { margin: 0 0 .75rem; }
dt { font-weight: 650; }
dd { margin: 0 0 .35rem; color: var(--muted); overflow-wrap: anywhere; }
.note { color: var(--muted); margin: .4rem 0; }
th[scope="row"] { color: var(--ink); font-size: inherit; white-space: pre-wrap; min-width: 6rem; }
th { overflow-wrap: anywhere; }
thead th { text-align: right; vertical-align: bottom; }
.texts { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
article, details { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; background: var(--panel); }
article h3 { margin: 0; overflow-wrap: anywhere; }
article .note { margin: 0; }
details { margin-top: .75rem; }
details article { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .5rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .35rem 0 0; }
.same { color: var(--muted); }
mark { background: rgb(var(--heat) / .4); color: var(--ink); }
.strip { position: relative; height: 1.5rem; margin: 0 6px .4rem; max-width: 46rem; }
.strip::before { content: ""; position: absolute; inset: 50% -6px auto; border-top: 1px solid var(--line); }
.strip span { position: absolute; top: 50%; transform: translate(-50%, -50%); background: var(--muted); }
.strip .random { width: 11px; height: 11px; border-radius: 50%; opacity: .5; }
.strip .own { width: 4px; height: 1.4rem; background: var(--series-1); }
.ends { display: flex; justify-content: space-between; max-width: 46rem; }
"""


def write_result(path: Path, result: SteerResult) -> None:
    """Write ``result`` as the ending of ``path`` says. Raises SettingsError, or StorageFull."""
    check_output(path)
    make_directory(path.absolute().parent)
    match path.suffix.lower():
        case ".parquet":
            write_table(path, SCHEMA, result.table().to_batches())
        case ".json":
            write_output(path, (json.dumps(json_of(result), indent=1, ensure_ascii=False) + "\n").encode())
        case _:
            write_output(path, page(result).encode())


def page(result: SteerResult) -> str:
    """Return a page with the numbers of every run, and of each prompt the texts beside each other."""
    runs = result.runs[1:]
    title = f"Steered: {runs[0]}" + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
    parts = [f"<header><h1>{html.escape(title)}</h1></header><main>"]
    if result.about:
        notes = "".join(
            f"<dt>Feature {html.escape(name)}</dt><dd>{html.escape(_printable(note(about)))}</dd>"
            for name, about in result.about.items()
        )
        parts.append(f"<dl>{notes}</dl>")
    parts += _numbers(result)
    parts += itertools.chain.from_iterable(_prompt(result, n) for n in range(len(result.prompts))[:SHOWN_PROMPTS])
    if len(result.prompts) > SHOWN_PROMPTS:
        parts.append(f'<p class="note">{len(result.prompts) - SHOWN_PROMPTS} more prompts are in Parquet and JSON.</p>')
    return html_page(title, "".join([*parts, "</main>"]), style=_STYLE)


def _numbers(result: SteerResult) -> Iterator[str]:
    """Yield the table of runs, and a picture of random features beside them."""
    heading, *rows = number_rows(result)
    yield '<div class="scroll-x" tabindex="0" role="region" aria-label="Numbers of each run"><table><thead><tr>'
    yield f"<td></td>{''.join(f'<th scope=col>{html.escape(cell)}</th>' for cell in heading[1:])}</tr></thead><tbody>"
    for label, *cells in rows:
        shown = "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in cells)
        yield f'<tr><th scope="row">{html.escape(label)}</th>{shown}</tr>'
    yield "</tbody></table></div>"
    yield (
        '<p class="note">KL(model ‖ changed) and the share of next tokens whose likeliest is another are means along '
        "the text that the model writes by itself.</p>"
    )
    if result.n_draws:
        yield from _strips(result)
        yield (
            f'<p class="note">KL of each run. Bars: the features asked for. Dots: {result.n_draws} draws of other '
            "features that are as often active, with the same strength times decoder norm.</p>"
        )


def _strips(result: SteerResult) -> Iterator[str]:
    """Yield the KL of every run as a bar on a line, with a dot for each draw of random features."""
    rows = [
        (label, result.summary(run).kl or 0.0, [one.kl or 0.0 for one in result.draws(run)])
        for run, label in enumerate(result.runs)
        if run
    ]
    largest = max(kl for _, own, draws in rows for kl in (own, *draws)) or 1.0
    for label, own, draws in rows:
        said = f"KL {own:.3g} nats, random features {min(draws):.3g} to {max(draws):.3g}"
        yield f'<div>{html.escape(label)}</div><div class="strip" role="img" aria-label="{html.escape(said)}">'
        for kind, kl in [*(("random", one) for one in draws), ("own", own)]:
            yield f'<span class="{kind}" style="left:{100 * kl / largest:.2f}%"></span>'
        yield "</div>"
    yield f'<div class="ends note"><span>0</span><span>{largest:.3g} nats</span></div>'


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
    number = f'<p class="note">{about}</p>' if about else ""
    shown = _marked(one, own, result.count)
    return f'<article><h3>{html.escape(label)}</h3>{number}<p class="text" dir="auto">{shown}</p></article>'


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
