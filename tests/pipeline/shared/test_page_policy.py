"""No page runs or loads what a text brings with it: every page states so, and browsers hold it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.support.browsers import watched_page
from tests.support.firefox import Firefox, open_firefox
from tests.support.written_pages import PAGES, PLAIN, folder_name, shown

ROOT = Path(__file__).parents[3]
FOLDERS = ("pipeline", "analysis", "training", "storage")
REFUSED = ("default-src", "object-src", "base-uri", "form-action")
_MAKES = re.compile(r"\b(?:html_page|html_document|policy_element)\(")
_INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def policy_of(page: str) -> dict[str, str]:
    """Return the directives that a page states before anything of it loads."""
    found = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert len(found) == 1
    before = page.partition("http-equiv")[0]
    assert not re.search(r"<(?:script|style|link|img|body)\b", before)
    return dict(directive.split(" ", 1) for directive in found[0].split("; "))


def test_pages_are_made_in_a_few_modules_and_all_of_these_are_tested() -> None:
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for kind in ("py", "html", "js")
        for path in (ROOT / folder).rglob(f"*.{kind}")
    }
    written_out = {name for name, text in sources.items() if re.search(r"<!doctype|<html", text, re.IGNORECASE)}
    assert written_out == {"pipeline/shared/pages.py", "pipeline/dashboard/site/index.html"}
    assert "<!--POLICY-->" in sources["pipeline/dashboard/site/index.html"]
    makers = {name for name, text in sources.items() if _MAKES.search(text)} - {"pipeline/shared/pages.py"}
    assert makers == {module for module, _ in PAGES.values()}


@pytest.mark.parametrize("name", [name for name in PAGES if name != "pareto"])  # two plots: below, with the slow ones
def test_a_page_states_what_it_runs_and_loads_nothing_from_elsewhere(tmp_path: Path, name: str) -> None:
    check_policy(PAGES[name][1](tmp_path, PLAIN))


def check_policy(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    policy = policy_of(page)
    assert all(policy.pop(directive) == "'none'" for directive in REFUSED)
    scripts = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in _INLINE.findall(page)]
    allowed = policy.pop("script-src", "").split()
    assert [one for one in allowed if one != "'self'"] == [f"'sha256-{one}'" for one in scripts]
    assert policy.pop("img-src") == "data:"
    assert set(" ".join(policy.values()).split()) <= {"'self'", "'unsafe-inline'"}
    assert policy.keys() <= {"style-src", "frame-src"}


PAYLOADS = tuple(
    payload.replace("RAN", f"window.ran=(window.ran||[]).concat({number})")
    for number, payload in enumerate(
        [
            "<script>RAN</script>",
            "</script><script>RAN</script>",
            "</title><script>RAN</script>",
            "</style><script>RAN</script>",
            "</textarea><script>RAN</script>",
            "--><script>RAN</script>",
            "<!--<script>RAN</script>",
            "]]><script>RAN</script>",
            "<ScRiPt>RAN</sCrIpT>",
            "<script/x>RAN</script>",
            "<scr<script>ipt>RAN</script>",
            "<img src=x onerror=RAN>",
            '"><img src=x onerror=RAN>',
            "'><img src=x onerror=RAN>",
            "<img/src=x/onerror=RAN>",
            "<svg onload=RAN>",
            "<svg><script>RAN</script></svg>",
            "</svg><img src=x onerror=RAN>",
            "<svg><animate onbegin=RAN attributeName=x dur=1s>",
            "<svg><style><img src=x onerror=RAN></style>",
            "<math><mtext><img src=x onerror=RAN></mtext></math>",
            "<body onload=RAN>",
            "<iframe srcdoc='<script>parent.RAN</script>'></iframe>",
            "<iframe src=javascript:parent.RAN></iframe>",
            "<object data=javascript:RAN></object>",
            "<embed src=https://evil.example/x.svg>",
            "<link rel=stylesheet href=https://evil.example/x.css>",
            "<style>@import'https://evil.example/x.css'</style>",
            "<base href=https://evil.example/>",
            "<meta http-equiv=refresh content=0;url=https://evil.example/>",
            "<form action=https://evil.example/><input autofocus onfocus=RAN>",
            "<details open ontoggle=RAN>",
            "<video><source onerror=RAN></video>",
            '" onmouseover="RAN" tabindex="1" autofocus onfocus="RAN',
            "' style='animation:x' onanimationstart='RAN",
            "javascript:RAN",
            "\\u003cimg src=x onerror=RAN\\u003e",
            "&lt;img src=x onerror=RAN&gt;",
            "${RAN}",
            "{{constructor.constructor('RAN')()}}",
            "\u2028<img src=x onerror=RAN>",
        ]
    )
)
VISIBLE = """() => {
  const page = document.documentElement.cloneNode(true);
  for (const one of page.querySelectorAll("script, style")) one.remove();
  const texts = [document.title, page.textContent];
  for (const one of document.querySelectorAll("*")) for (const { value } of one.attributes) texts.push(value);
  for (const one of document.querySelectorAll("input, textarea")) texts.push(one.value);
  return texts.join("\\n");
}"""
OPENED = {"site": ["", *(f"#feature={feature}" for feature in range(0, len(PAYLOADS), 6))]}
"""Addresses within a page beside its own."""
SHOWN = {"blind items": 0, "blind item": 16, "rating form": 16}
"""Payloads that a page has room for, where that is not all: a list of numbers, and windows of 16 tokens."""


@pytest.fixture(scope="module")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    with open_firefox(tmp_path_factory.mktemp("firefox") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every page with every payload, in a folder that is called by one."""
    folder = tmp_path_factory.mktemp("hostile") / folder_name("<img src=x onerror='window.ran=1'>&#x27;\"")
    made = {}
    for name, (_, write) in PAGES.items():
        (folder / name).mkdir(parents=True)
        made[name] = write(folder / name, PAYLOADS)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_payloads_are_shown_as_text_and_none_runs(browser: Browser, hostile: dict[str, Path], name: str) -> None:
    check_policy(hostile[name])
    seen = ""
    with watched_page(browser) as watched:  # which fails on a request to elsewhere, and on what the policy had to stop
        for fragment in OPENED.get(name, [""]):
            watched.page.goto("about:blank")
            watched.page.goto(hostile[name].as_uri() + fragment)
            watched.page.wait_for_timeout(500)
            for element in watched.page.locator("[data-tip]:visible").all()[:10]:
                element.hover(force=True)
            for frame in watched.page.frames:
                assert frame.evaluate("window.ran") is None
                seen += frame.evaluate(VISIBLE)
            assert len(watched.page.frames) == (2 if name == "rating form" else 1)
            assert watched.page.evaluate("document.baseURI") == watched.page.url
    seen = "".join(seen.split())
    missing = {text for text in PAYLOADS if shown(text) not in seen and shown(folder_name(text)) not in seen}
    assert len(PAYLOADS) - len(missing) >= SHOWN.get(name, len(PAYLOADS)), missing


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_was_not_made_with_does_not_run_in_it(browser: Browser, tmp_path: Path, name: str) -> None:
    """As if a page had let markup through."""
    page = PAGES[name][1](tmp_path, PLAIN)
    markup = f"{PAYLOADS[0]}{PAYLOADS[11]}<a href='javascript:window.ran=1'>x</a>"
    page.write_text(page.read_text().replace("<body>", f"<body>{markup}"))
    context = browser.new_context()
    try:
        opened = context.new_page()
        refused: list[str] = []
        opened.on("console", lambda message: refused.append(message.text))
        opened.goto(page.as_uri())
        opened.get_by_role("link", name="x", exact=True).first.click()
        opened.wait_for_timeout(300)
        assert opened.evaluate("window.ran") is None
        assert len([text for text in refused if "Content Security Policy" in text]) >= 3
    finally:
        context.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_pages_draw_in_firefox_and_payloads_do_not_run(firefox: Firefox, hostile: dict[str, Path], name: str) -> None:
    for fragment in OPENED.get(name, [""])[:2]:
        firefox.open(hostile[name].as_uri() + fragment)
        firefox.wait_for("document.querySelector('main:not([hidden])')?.textContent.trim().length > 5")
        firefox.run("return new Promise((done) => setTimeout(done, 300))")
        assert firefox.run("return window.ran ?? null") is None
        assert firefox.complaints() == []
