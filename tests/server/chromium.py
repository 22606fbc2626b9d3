"""A real browser for tests: Chromium without a window, told what to do over a pipe (the DevTools protocol)."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import os
import shutil
import signal
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
from deadlines import WITHIN

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root, too
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The pipe is descriptors 3 and 4 of the browser, whatever they are here.
_WITH_PIPE = (
    "import fcntl, os, sys\n"
    "r, w = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])\n"
    "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def executable() -> str | None:
    """Where Chromium is on this machine, if it is."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@dataclass
class Target:
    """A page, or a frame that has a process of its own."""

    browser: Browser
    session: str
    kind: str

    async def tell(self, method: str, **params: Any) -> dict[str, Any]:
        return await self.browser.tell(method, session=self.session, **params)

    async def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise.

        Raises:
            AssertionError: it threw.
        """
        answer = await self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, claim: str) -> None:
        """Returns when the expression is true; fails after a deadline and says what the body holds then."""
        with anyio.move_on_after(WITHIN):
            while True:
                if await self.evaluate(f"Boolean({claim})"):
                    return
                await anyio.sleep(0.02)
        raise AssertionError(f"{claim} did not come true: {await self.evaluate('document.body.innerText')}")

    async def press(self, key: str, text: str = "") -> None:
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            await self.tell("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    async def screenshot(self) -> bytes:
        return base64.b64decode((await self.tell("Page.captureScreenshot", format="png"))["data"])


@dataclass
class Browser:
    send: Callable[[bytes], None]
    targets: list[Target] = field(default_factory=list[Target])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    bindings: dict[str, Callable[[str], Awaitable[None]]] = field(default_factory=dict[str, Any])
    """What a page calls by `Runtime.addBinding`: its name, and what takes the text that it was given."""
    _asked: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict[int, Any])
    _last: int = 0

    async def tell(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """
        Raises:
            AssertionError: the browser refused it.
        """
        self._last += 1
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[self._last] = future
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        self.send(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        with anyio.fail_after(WITHIN):
            answer = await future
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def page(self, html: str) -> Target:
        """A new tab that shows the document."""
        target = await self.tell("Target.createTarget", url="about:blank")
        await self.tell("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self.targets[-1]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await page.tell(f"{domain}.enable")
        await page.tell("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        frame = (await page.tell("Page.getFrameTree"))["frameTree"]["frame"]["id"]
        await page.tell("Page.setDocumentContent", frameId=frame, html=html)
        return page

    async def frame(self) -> Target:
        """The one frame of the page; it has a process of its own."""
        (frame,) = [target for target in self.targets if target.kind == "iframe"]
        for domain in ("Runtime", "Network", "Log"):
            await frame.tell(f"{domain}.enable")
        return frame

    async def heard(self, message: dict[str, Any], group: Any) -> None:
        if (number := message.get("id")) is not None:
            future = self._asked.pop(number)
            if not future.done():
                future.set_result(message)
            return
        self.events.append(message)
        params = message["params"]
        match message["method"]:
            case "Target.attachedToTarget":
                self.targets.append(Target(self, params["sessionId"], params["targetInfo"]["type"]))
            case "Runtime.bindingCalled":
                group.start_soon(self.bindings[params["name"]], params["payload"])
            case _:
                pass


@asynccontextmanager
async def browser(path: str, folder: Path) -> AsyncGenerator[Browser]:
    """Chromium at `path` with an empty profile in `folder`; gone with all its processes at the end."""
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    arguments = [str(their_in), str(their_out), path, *FLAGS, f"--user-data-dir={folder}"]
    process = await anyio.open_process(
        [sys.executable, "-c", _WITH_PIPE, *arguments],
        pass_fds=(their_in, their_out),
        start_new_session=True,
        stdin=None,
        stdout=None,
        stderr=-3,
    )
    os.close(their_in)
    os.close(their_out)
    made = Browser(lambda message: _write(our_out, message))
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_listen, made, our_in, group)
            yield made
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            with suppress(BrokenPipeError):
                _write(our_out, b'{"id": 0, "method": "Browser.close"}\0')
            with anyio.move_on_after(5):
                await process.wait()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        os.close(our_in)
        os.close(our_out)


def _write(descriptor: int, message: bytes) -> None:
    while message:
        message = message[os.write(descriptor, message) :]


async def _listen(made: Browser, descriptor: int, group: Any) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_NONBLOCK)
    buffer = b""
    while True:
        await anyio.wait_readable(descriptor)
        if not (read := os.read(descriptor, 1 << 20)):
            return
        *whole, buffer = (buffer + read).split(b"\0")
        for message in whole:
            await made.heard(json.loads(message), group)
