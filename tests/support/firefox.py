"""Debian's Firefox for tests, by WebDriver's commands as Firefox itself understands them: no driver program is needed.

Firefox answers WebDriver's commands on a socket (its Marionette protocol), where geckodriver would only pass them on:
each message is its length in bytes, a colon, and a JSON list of kind, number, name or error, and parameters or result.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.browsers import SKIP

PLACE = "TAILRACE_FIREFOX"
"""Environment variable: the path of a Firefox other than the one found."""
START_SECONDS, ANSWER_SECONDS = 180, 300
"""Long, for machines that run other tests too."""
_PREFERENCES = """\
user_pref("marionette.port", 0);
user_pref("browser.shell.checkDefaultBrowser", false);
user_pref("datareporting.policy.dataSubmissionEnabled", false);
user_pref("network.captive-portal-service.enabled", false);
user_pref("network.connectivity-service.enabled", false);
"""
_WATCH = """
window.complaints = [];
window.addEventListener("error", (event) => window.complaints.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => window.complaints.push(String(event.reason)));
"""


class Firefox:
    """A running Firefox with one window."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS)
        self._received = self._socket.makefile("rb")
        self._n_sent = 0
        self._receive()  # it greets
        self.command("WebDriver:NewSession", capabilities={"alwaysMatch": {}})

    def command(self, name: str, **parameters: Any) -> Any:
        """Return what Firefox answers to a command; raise AssertionError with its error."""
        self._n_sent += 1
        message = json.dumps([0, self._n_sent, name, parameters]).encode()
        self._socket.sendall(b"%d:" % len(message) + message)
        _, number, error, result = self._receive()
        assert (number, error) == (self._n_sent, None), f"{name}: {error}"
        return result

    def open(self, address: str, width: int = 1360) -> None:
        """Load a page in a window of that many pixels, not counting what frames it."""
        self.command("WebDriver:SetWindowRect", width=width, height=900)
        self.command("WebDriver:Navigate", url="about:blank")
        self.command("WebDriver:Navigate", url=address)
        self.run(_WATCH)

    def run(self, script: str) -> Any:
        """Return what the body of a function, run in the page, returns."""
        return self.command("WebDriver:ExecuteScript", script=script, args=[])["value"]

    def wait_for(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + 60
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.1)

    def complaints(self) -> list[str]:
        """Return the errors of scripts since the page was loaded."""
        found: list[str] = self.run("return window.complaints")
        return found

    def quit(self) -> None:
        """End the program."""
        self.command("Marionette:Quit", flags=["eForceQuit"])
        self._socket.close()

    def _receive(self) -> Any:
        digits = b""
        while (byte := self._received.read(1)) != b":":
            assert byte, "Firefox closed the connection"
            digits += byte
        return json.loads(self._received.read(int(digits)))


@contextmanager
def open_firefox(profile: Path) -> Iterator[Firefox]:
    """Start Firefox off the screen, with the new folder ``profile``; skip the test where there is none."""
    if os.environ.get(SKIP) == "1":
        pytest.skip(f"{SKIP}=1")
    program = os.environ.get(PLACE) or shutil.which("firefox-esr") or shutil.which("firefox")
    if program is None:
        pytest.skip(f"no Firefox found: install one (apt install firefox-esr) or set {PLACE}")
    profile.mkdir(parents=True)
    (profile / "user.js").write_text(_PREFERENCES)
    arguments = [program, "--headless", "--marionette", "--no-remote", "--profile", str(profile), "about:blank"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        firefox = Firefox(_port(profile / "MarionetteActivePort", process))
        yield firefox
        firefox.quit()
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + START_SECONDS
    while not (file.exists() and file.read_text().strip()):
        assert process.poll() is None, f"Firefox ended with {process.returncode} as it started"
        assert time.monotonic() < end, f"Firefox did not start in {START_SECONDS} s"
        time.sleep(0.1)
    return int(file.read_text())
