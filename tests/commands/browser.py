"""Headless Chromium for tests, without a library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, " ": 32, "Backspace": 8}
# In .ci/browser nothing is skipped: without a browser these tests fail.
REQUIRED = "BROWSER_REQUIRED" in os.environ
needs_browser = pytest.mark.skipif(
    BROWSER is None and not REQUIRED, reason="no Chromium here: apt-get install chromium, or run .ci/browser"
)


class Browser:
    """Headless Chromium behind a pipe: commands in, answers out, each with a zero byte at its end."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER, "no Chromium on the path: install one, as with apt-get install chromium"
        to_read, self.to_browser = os.pipe()
        self.from_browser, to_write = os.pipe()
        # Chromium expects its ends of the pipe at 3 and 4.
        moved = "os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4)"
        launch = f"import os, sys; {moved}; os.execv(sys.argv[3], sys.argv[3:])"
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
        ends = [str(to_read), str(to_write)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", launch, *ends, BROWSER, *options.split(), f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.number, self.rest, self.session = 0, b"", None
        self.target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params) -> dict:
        """Run one command and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        answer = next(message for message in iter(self.read, None) if message.get("id") == self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.from_browser, 1 << 20)
            assert part, "the browser has closed its pipe"
            self.rest += part
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for(lambda: self.look("document.readyState") == "complete")

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "the browser did not do it within a minute"

    def look(self, expression: str):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key])

    def picture(self, **options) -> bytes:
        """Screenshot, as PNG unless the browser's options say otherwise."""
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    def close(self) -> None:
        """Close the page, then the browser, so that it writes its storage even on a busy machine."""
        self.call("Page.navigate", url="about:blank")
        time.sleep(0.5)  # the page's last writes to its storage reach the browser's own process asynchronously
        self.session = None
        self.call("Target.closeTarget", targetId=self.target)
        os.write(self.to_browser, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        self.process.wait(60)
        os.close(self.to_browser)
        os.close(self.from_browser)
