"""Chromium without a window, driven over its DevTools pipe: what tests of a live page need, and no more."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GIVE_UP_S = 120


class Browser:
    """One page in one browser; `asked` are the addresses that it has requested, `said` what it has logged."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900) -> None:
        commands, answers = os.pipe(), os.pipe()
        self._out, self._in = commands[1], answers[0]
        quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        still = ("--disable-background-networking", "--disable-component-update", "--force-prefers-reduced-motion")
        # The browser reads commands from file 3 and answers on file 4.
        to_pipes = 'exec "$0" "$@" 3<&"$COMMANDS" 4>&"$ANSWERS"'
        self.process = subprocess.Popen(
            ["bash", "-c", to_pipes, CHROMIUM, *quiet, *still, "--remote-debugging-pipe",
             f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
            env=os.environ | {"COMMANDS": str(commands[0]), "ANSWERS": str(answers[1])},
            pass_fds=(commands[0], answers[1]), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands[0])
        os.close(answers[1])
        self._rest, self._count, self._session = b"", 0, None
        self.asked: list[str] = []
        self.said: list[str] = []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.tell(f"{part}.enable")
        self.resize(width, height)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._out)
        os.close(self._in)

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        give_up = time.monotonic() + GIVE_UP_S
        while True:
            found = self._next(give_up)
            if found.get("id") == self._count:
                assert "error" not in found, (method, found)
                return found["result"]
            self._note(found)

    def _next(self, give_up: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0, give_up - time.monotonic()))
            assert ready, "the browser does not answer"
            read = os.read(self._in, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, found: dict[str, Any]) -> None:
        params = found.get("params", {})
        match found.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            case "Runtime.consoleAPICalled" if params["type"] == "error":
                self.said.append(str([each.get("value", each.get("description")) for each in params["args"]]))
            case "Runtime.exceptionThrown":
                self.said.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address: str) -> None:
        """Go to an address."""
        self.tell("Page.navigate", url=address)

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value; for a part of the page, True."""
        expression = f"(found => found instanceof Node || found)({expression})"
        give_up = time.monotonic() + GIVE_UP_S
        while not (found := self.ask(expression)):
            assert time.monotonic() < give_up, f"{expression}\n{self.ask('document.body.innerText')}\n{self.said}"
            time.sleep(0.05)
        return found

    def upload(self, selector: str, *paths: Path) -> None:
        """Choose files in a file input."""
        root = self.tell("DOM.getDocument")["root"]["nodeId"]
        node = self.tell("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.tell("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve()) for path in paths])

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        found = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
