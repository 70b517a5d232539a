"""Opens pages in Debian's headless Chromium and tells what happened: the document, the console, what was asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass(frozen=True)
class Browsed:
    """A page after its scripts have run.

    Attributes:
        dom: The document as HTML.
        console: What was written to the console: messages, errors and violations of the page's policy.
        asked: The addresses that the page asked for, itself not among them.

    """

    dom: str
    console: list[str]
    asked: list[str]

    @property
    def root(self) -> dict[str, str]:
        """The attributes of the root element, which scripts of the tests write to."""
        tag = re.search(r"<html([^>]*)>", self.dom)
        return dict(re.findall(r'([\w-]+)="([^"]*)"', tag[1])) if tag else {}

    def chart(self, name: str) -> str:
        """The HTML within the place of a chart, up to the end of its figure."""
        start = self.dom.index(f'data-chart="{name}"')
        return self.dom[start : self.dom.index("</figure>", start)]


def browse(page: Path, *, dark: bool = False, width: int = 1280, script: str = "", trusting: bool = False) -> Browsed:
    """Open a page, with no host to be found, and wait until it is quiet.

    Args:
        page: The file.
        dark: Whether the browser prefers dark pages.
        width: The window's width in pixels.
        script: JavaScript of a test, run when the page says that it is ready. The page's policy is taken away for it.
        trusting: Whether the page's policy is taken away in any case.

    """
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder:
        shown, log = Path(folder, "page.html"), Path(folder, "net.json")
        text = page.read_text()
        if script or trusting:
            text, found = POLICY.subn("", text)
            assert found == 1
        if script:
            waiting = (
                "const ready = setInterval(async () => { if (document.documentElement.dataset.ready !== 'yes') return;"
                f" clearInterval(ready); {script} }}, 50);"
            )
            text = f"<script>{waiting}</script></body>".join(text.rsplit("</body>", 1))
        shown.write_text(text)
        command = [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(f"--user-data-dir={folder}/profile", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(f"--log-net-log={log}", "--net-log-capture-mode=Everything", f"--window-size={width},1200"),
            *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000"),
            *("--dump-dom", shown.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        events = json.loads(log.read_text())["events"]
    asked = [
        one["params"]["url"]
        for one in events
        if "url" in one.get("params", {}) and one["params"].get("initiator", "not an origin") != "not an origin"
    ]
    console = re.findall(r'CONSOLE[:(]\d+\)?\] (".*), source:', done.stderr)
    return Browsed(done.stdout, console, sorted(set(asked)))
