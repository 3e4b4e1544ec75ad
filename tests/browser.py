"""A headless Chromium for tests, spoken to as its driver wants it (W3C WebDriver), without a library."""

import base64
import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """One window. `width` is that of the page, as a phone has it below 600."""

    def __init__(self, port: int, width: int) -> None:
        self.at = f"http://127.0.0.1:{port}/session"
        options: dict[str, Any] = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]}
        options["mobileEmulation"] = {
            "deviceMetrics": {"width": width, "height": 900, "pixelRatio": 1, "touch": width < 600}
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.at += "/" + self("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def __call__(self, command: str, body: dict[str, Any] | None = None, method: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.at + command, data, method=method or ("POST" if data else "GET"))
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:  # its body says why
            raise AssertionError(error.read().decode()) from error

    def open(self, path: Path) -> None:
        self("/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *values: Any) -> Any:
        """What a piece of JavaScript returns; `values` are its `arguments`."""
        return self("/execute/sync", {"script": script, "args": values})

    def keys(self, text: str) -> None:
        """Press keys, where the focus is."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse there, in pixels of the window."""
        actions = [
            {"type": "pointerMove", "x": round(x), "y": round(y)},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        self("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def dark(self, wanted: bool) -> None:
        """What the page is told of the system's colours."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}]
        self("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def complaints(self) -> list[str]:
        """What the console has said so far."""
        return [entry["message"] for entry in self("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses asked for so far, without those that are data."""
        events = [json.loads(entry["message"])["message"] for entry in self("/se/log", {"type": "performance"})]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self("/goog/cdp/execute", {"cmd": "Page.getLayoutMetrics", "params": {}})["cssContentSize"]
        area = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12000), "scale": 1}
        shot = {"captureBeyondViewport": True, "clip": area}
        found = self("/goog/cdp/execute", {"cmd": "Page.captureScreenshot", "params": shot})
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def driver() -> Iterator[int]:
    """The port of a running chromedriver; skips the test where there is none."""
    if not (program := shutil.which("chromedriver")) or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("runs where chromium and chromedriver are, as in CI")
    process = subprocess.Popen([program, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout if "successfully" in line)  # type: ignore[union-attr]
        yield int(line.strip(" .\n").rpartition(" ")[2])
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def window(port: int, width: int) -> Iterator[Browser]:
    """A browser that is closed in the end."""
    browser = Browser(port, width)
    try:
        yield browser
    finally:
        browser("", method="DELETE")
