# SPDX-License-Identifier: MIT
"""Drivers for the three browser engines, with the same few verbs for each.

Firefox and WebKit take a prefix, a command that starts them in another network namespace; Chromium is started
by the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import httpx
from playwright.sync_api import Browser, Page

PATIENCE = 30.0  # seconds that a test waits for a condition; machines can be slow


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.01)
    return result


def random_port() -> int:
    """A port below the ephemeral range; few others are in use in a browser's namespace."""
    return 10_000 + secrets.randbelow(20_000)


@contextlib.contextmanager
def in_network_of(pid: int) -> Iterator[None]:
    """Sockets that this thread makes meanwhile are in the network namespace of this process."""
    setns = ctypes.CDLL(None).setns
    paths = Path("/proc/thread-self/ns/net"), Path(f"/proc/{pid}/ns/net")
    with paths[0].open() as here, paths[1].open() as there:
        assert setns(there.fileno(), 0) == 0
        try:
            yield
        finally:
            assert setns(here.fileno(), 0) == 0


class NamespaceTransport(httpx.HTTPTransport):
    """Connects in the network namespace of a process."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.pid = pid

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with in_network_of(self.pid):
            return super().handle_request(request)


class Engine:
    """A browser with the few verbs that the suite for all engines needs."""

    aside = 0

    def visit(self, url: str) -> None:
        raise NotImplementedError

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, once it has one."""
        raise NotImplementedError

    def hold(self, x: float, y: float, seconds: float) -> None:
        """Press the mouse here for so long."""
        raise NotImplementedError

    def keys(self, *chords: str) -> None:
        """Press keys one after another; `Control+v` is two at once."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def open(self, url: str) -> None:
        """Visit a page of ours, and wait until it can be used."""
        self.visit(url)
        self.wait("document.querySelector('#mine button')")

    def wait(self, expression: str) -> None:
        until(lambda: self.js(f"!!({expression})"))

    def text(self, selector: str) -> str:
        """The text of an element, empty if there is no such element."""
        text: str = self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        return text.replace("\xa0", " ")

    def press(self, selector: str, seconds: float = 0) -> None:
        x, y, width, height = self.js(f"""((element) => {{
          element.scrollIntoView({{ block: "nearest" }});
          const {{ x, y, width, height }} = element.getBoundingClientRect();
          return [x, y, width, height];
        }})(document.querySelector({json.dumps(selector)}))""")
        self.aside = 8 - self.aside  # pixels: two presses of one place would be a double click
        self.hold(x + width / 2 + self.aside, y + height / 2, seconds)

    def begin(self, url: str) -> None:
        """Begin the test that a link describes."""
        self.open(url)
        self.press("#run")

    def run(self, url: str) -> str:
        """The verdict of the test that a link describes."""
        self.begin(url)
        return self.ended()

    def ended(self) -> str:
        self.wait("document.querySelector('#run:not(.stop)')")
        return self.text("#results h2")


class Chromium(Engine):
    """Chromium, by Playwright."""

    def __init__(self, browser: Browser, dark: bool = False, script: bool = True) -> None:
        self.browser = browser
        self.page = browser.new_page(color_scheme="dark" if dark else "light", java_script_enabled=script)
        self.page.set_default_timeout(PATIENCE * 1000)
        self.visit, self.js = self.page.goto, self.page.evaluate  # type: ignore[method-assign, assignment]

    def hold(self, x: float, y: float, seconds: float) -> None:
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        time.sleep(seconds)
        self.page.mouse.up()

    def keys(self, *chords: str) -> None:
        for chord in chords:
            self.page.keyboard.press(chord)

    def close(self) -> None:
        self.browser.close()


KEYS = {"Enter": "\ue007", "Tab": "\ue004", "Control": "\ue009", "Escape": "\ue00c", "ArrowRight": "\ue014"}
EXPRESSION = (
    "const done = arguments[0]; (async () => ({}))().then(done, (error) => done(`failed: ${{error}}`))"
)


class Driven(Engine):
    """A browser that takes WebDriver's commands: https://www.w3.org/TR/webdriver2/"""

    process: subprocess.Popen[bytes]

    def command(self, name: str, **parameters: Any) -> Any:
        raise NotImplementedError

    def start(self, folder: Path, *argv: str, **environment: str) -> None:
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                env={**os.environ, "HOME": str(folder), **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def visit(self, url: str) -> None:
        self.command("Navigate", url=url)

    def js(self, expression: str) -> Any:
        value = self.command("ExecuteAsyncScript", script=EXPRESSION.format(expression), args=[])
        assert not str(value).startswith("failed: "), value
        return value

    def act(self, kind: str, actions: list[dict[str, Any]], **more: Any) -> None:
        self.command("PerformActions", actions=[{"type": kind, "id": kind, "actions": actions, **more}])

    def hold(self, x: float, y: float, seconds: float) -> None:
        move, down = {"type": "pointerMove", "x": int(x), "y": int(y)}, {"type": "pointerDown", "button": 0}
        pause, up = {"type": "pause", "duration": int(seconds * 1000)}, {"type": "pointerUp", "button": 0}
        self.act("pointer", [move, down, pause, up], parameters={"pointerType": "mouse"})

    def keys(self, *chords: str) -> None:
        actions = []
        for chord in chords:
            values = [KEYS.get(key, key) for key in chord.split("+")]
            actions += [{"type": "keyDown", "value": value} for value in values]
            actions += [{"type": "keyUp", "value": value} for value in reversed(values)]
        self.act("key", actions)

    def close(self) -> None:
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):  # noqa: PTH208
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == self.process.pid:
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


class Firefox(Driven):
    """Firefox, by Marionette, which sends WebDriver's commands over a socket."""

    def __init__(
        self, folder: Path, prefix: tuple[str, ...], dark: bool = False, script: bool = True
    ) -> None:
        self.port, self.number = random_port(), 0
        settings = {
            "marionette.port": self.port,
            "layout.css.prefers-color-scheme.content-override": 0 if dark else 1,
            "javascript.enabled": script,
            "browser.shell.checkDefaultBrowser": False,
            "datareporting.policy.dataSubmissionEnabled": False,
            "network.captive-portal-service.enabled": False,
            "network.connectivity-service.enabled": False,
        }
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in settings.items()]
        (folder / "user.js").write_text("\n".join(lines))
        options = ("--headless", "--no-remote", "--marionette", "--profile", str(folder), "about:blank")
        self.start(folder, *prefix, "firefox-esr", *options)
        self.stream = until(self.connect).makefile("rwb")
        self.receive()
        self.command("NewSession")

    def connect(self) -> socket.socket | None:
        with contextlib.suppress(OSError), in_network_of(self.process.pid):
            return socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        return None

    def receive(self) -> Any:
        length = b"".join(iter(lambda: self.stream.read(1), b":"))
        return json.loads(self.stream.read(int(length)))

    def command(self, name: str, **parameters: Any) -> Any:
        self.number += 1
        message = json.dumps([0, self.number, f"WebDriver:{name}", parameters]).encode()
        self.stream.write(b"%d:%s" % (len(message), message))
        self.stream.flush()
        _, _, error, result = self.receive()
        assert not error, error
        return result.get("value")


class WebKit(Driven):
    """WebKitGTK, which is Safari's engine, by WebKitWebDriver on a screen of its own."""

    PATHS: ClassVar = {"Navigate": "url", "ExecuteAsyncScript": "execute/async", "PerformActions": "actions"}

    def __init__(
        self, folder: Path, prefix: tuple[str, ...], dark: bool = False, script: bool = True
    ) -> None:
        port = random_port()
        environment = {
            "XDG_RUNTIME_DIR": str(folder),
            "GTK_THEME": "Adwaita:dark" if dark else "Adwaita",
            "GSETTINGS_BACKEND": "memory",
            "LIBGL_ALWAYS_SOFTWARE": "1",
            "NO_AT_BRIDGE": "1",
            "WEBKIT_DISABLE_COMPOSITING_MODE": "1",
            "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1",
        }
        screen = ("xvfb-run", "-a", "-s", "-screen 0 1400x2400x24")
        driver = ("dbus-run-session", "--", "WebKitWebDriver", f"--port={port}")
        self.start(folder, *prefix, *screen, *driver, **environment)
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=PATIENCE,
            trust_env=False,
            transport=NamespaceTransport(self.process.pid),
        )
        program = next(Path("/usr/lib").glob("*/webkit2gtk-4.1/MiniBrowser"))
        options = {"binary": str(program), "args": ["--automation", f"--enable-javascript={script}".lower()]}
        wanted = {"capabilities": {"alwaysMatch": {"webkitgtk:browserOptions": options}}}
        self.http.base_url = self.http.base_url.join(f"/session/{until(partial(self.new_session, wanted))}")

    def new_session(self, wanted: Mapping[str, Any]) -> str | None:
        with contextlib.suppress(httpx.ConnectError):
            return str(self.http.post("/session", json=wanted).json()["value"]["sessionId"])
        return None

    def command(self, name: str, **parameters: Any) -> Any:
        answer = self.http.post(f"/{self.PATHS[name]}", json=parameters).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


# Chromium's pages, by Playwright itself

# Run before a page's own script: notes layout shifts, and what the status region announces.
WATCH = """
window.shifts = [];
let begun = Infinity; // what a slow machine paints before the script has run is not counted
addEventListener("load", () => setTimeout(() => (begun = performance.now()), 100));
const late = (entries) => entries.filter((each) => !each.hadRecentInput && each.startTime > begun);
const edges = ({ x, y, width, height }) => [x, y, width, height].map(Math.round).join(" ");
const where = ({ sources }) => sources.map(({ node, previousRect, currentRect }) =>
  `${node?.outerHTML ?? node?.data}: ${edges(previousRect)} -> ${edges(currentRect)}`.slice(-200));
new PerformanceObserver((list) => shifts.push(...late(list.getEntries()).map(where)))
  .observe({ type: "layout-shift", buffered: true });
window.announced = [];
addEventListener("DOMContentLoaded", () => {
  const status = document.getElementById("status");
  const note = () => announced.push(status.textContent);
  const all = { childList: true, characterData: true, subtree: true };
  if (status) new MutationObserver(note).observe(status, all);
});
"""


def open_page(browser: Browser, url: str, faults: list[str], **options: Any) -> Page:
    """The page at `url`, ready for a click; errors and breaches of its policy go to `faults`."""
    context = browser.new_context(**options)
    context.add_init_script(WATCH)
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.extend(re.findall(".*(?:olicy|attribute).*", said.text)))
    page.goto(url)
    if options.get("java_script_enabled", True):
        page.wait_for_selector("#mine button", state="attached")
    return page


def shifts(page: Page) -> list[Any]:
    """The layout shifts without a click before, as the browser reports them: those of a frame in the next."""
    frame = "await new Promise(requestAnimationFrame);"
    return cast(list[Any], page.evaluate(f"(async () => {{ {frame} {frame} return shifts; }})()"))
