"""The live card in a real browser, in a host that hands its calls on to a server over HTTP."""

from __future__ import annotations

import os
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from card_host import Host, hosting
from chromium import executable
from mcp_doors import Doors, in_loop, opened

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=document.title='owned'><script>alert(1)</script>"


def text_of(place: str) -> str:
    return f"document.querySelector('{place}').textContent"


@asynccontextmanager
async def host_with_a_server(folder: Path) -> AsyncGenerator[tuple[Host, Doors]]:
    path = executable()
    if path is None and "BROWSER_REQUIRED" not in os.environ:
        pytest.skip("there is no Chromium here; .ci/browser installs it")
    assert path is not None, "there is no Chromium here"
    async with (
        opened(folder, http=True) as doors,
        doors.client("http-modern") as client,
        hosting(path, folder / "profile", client) as host,
    ):
        yield host, doors


async def start(host: Host, **arguments: Any) -> Any:
    result = await host.client.call_tool("execute_task", {"title": "Index the documents", "role": "gated", **arguments})
    assert not result.is_error
    return result


async def test_the_card_follows_a_run_to_its_end_and_then_asks_no_more(tmp_path: Path) -> None:
    async with host_with_a_server(tmp_path) as (host, doors):
        more = anyio.Event()

        async def steps(context: Any) -> None:
            context.progress(10, "step 1")
            await more.wait()
            context.progress(90, "step 2")
            await doors.gate.open.wait()

        doors.vespera.roles.add(in_loop(steps, "steps"))
        frame = await host.show(await start(host, role="steps"))
        await frame.until(f"{text_of('#message')} === 'step 1'")
        # Nothing is said of the remaining time in the first second.
        await frame.until(f"{text_of('#elapsed')} === '1 s'")
        more.set()
        await frame.until(f"{text_of('#message')} === 'step 2'")
        assert await frame.evaluate(text_of("#percentage")) == "84 %"
        assert await frame.evaluate(text_of("h1")) == "Index the documents"
        assert await frame.evaluate("document.querySelector('[role=progressbar]').ariaValueNow") == "84"
        assert await frame.evaluate(text_of("#live")) == "running, 75 percent"
        assert re.fullmatch(r"about \d+ s left|\d+ s to \d+ s left", str(await frame.evaluate(text_of("#eta"))))
        assert re.fullmatch(r"\d+ s", str(await frame.evaluate(text_of("#elapsed"))))
        assert await frame.evaluate(text_of("#phase")) == "execution"
        doors.gate.open.set()
        await frame.until(f"{text_of('#state')} === 'completed'")
        assert await frame.evaluate(text_of("#percentage")) == "100 %"
        assert await frame.evaluate("document.querySelector('#cancel').hidden")
        assert await frame.evaluate(text_of("#live")) == "completed"
        known = len(host.calls)
        assert set(host.calls) == {"get_task_execution_status", "stream_task_execution_events"}
        assert host.calls[-1] == "get_task_execution_status"
        # Longer than the pause between two of its calls.
        await frame.evaluate("new Promise((go) => setTimeout(go, 500))")
        assert len(host.calls) == known
        height = await host.page.evaluate("view.getBoundingClientRect().height")
        assert 60 < height <= 160
        assert host.requested() == []
        assert host.complaints() == []


async def test_the_button_asks_once_more_and_then_the_task_is_gone(tmp_path: Path) -> None:
    async with host_with_a_server(tmp_path) as (host, _):
        started = await start(host)
        frame = await host.show(started)
        await frame.until("!document.querySelector('#cancel').hidden")
        await frame.evaluate("document.querySelector('#cancel').focus()")
        await frame.press("Enter", "\r")
        await frame.until(f"{text_of('#cancel')} === 'Really cancel?'")
        await frame.press("Escape")
        assert await frame.evaluate(text_of("#cancel")) == "Cancel"
        assert "cancel_task_execution" not in host.calls
        await frame.press("Enter", "\r")
        await frame.press("Enter", "\r")
        await frame.until(f"{text_of('#state')} === 'cancelled'")
        ended = await host.client.call_tool("get_task_result", {"task_id": started.structured_content["task_id"]})
        assert ended.structured_content is not None
        assert ended.structured_content["status"] == "cancelled"


async def test_what_the_work_says_stays_text_and_the_theme_is_the_hosts(tmp_path: Path) -> None:
    async with host_with_a_server(tmp_path) as (host, doors):

        async def hostile(context: Any) -> None:
            context.progress(10, HOSTILE)
            await doors.gate.open.wait()

        doors.vespera.roles.add(in_loop(hostile, "hostile"))
        started = await start(host, title=HOSTILE, role="hostile")
        frame = await host.show(started, given={"title": HOSTILE}, theme="dark")
        await frame.until(f"{text_of('#message')}.startsWith('<img')")
        assert await frame.evaluate(text_of("h1")) == HOSTILE
        assert await frame.evaluate("document.querySelectorAll('img, script').length") == 1
        assert await frame.evaluate("document.title") == "Task"
        assert await frame.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(31, 31, 30)"
        lighter = '{ method: "ui/notifications/host-context-changed", params: { theme: "light" } }'
        await host.page.evaluate(f"tell({lighter})")
        await frame.until("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
        # A host that is opened again tells the card the same once more.
        again = await host.show(started, theme="dark")
        await again.until(f"{text_of('#percentage')} === '36 %'")
        assert host.complaints() == []


async def test_a_question_stands_on_the_card_until_it_is_answered(tmp_path: Path) -> None:
    async with host_with_a_server(tmp_path) as (host, doors):

        async def asks(context: Any) -> None:
            context.ask("deploy", message=f"Deploy build 7? {'It replaces build 6. ' * 20}")

        doors.vespera.roles.add(in_loop(asks, "asks"))
        started = await start(host, role="asks")
        frame = await host.show(started)
        await frame.until(f"{text_of('#state')} === 'waiting for an answer'")
        assert str(await frame.evaluate(text_of("#question"))).startswith("Deploy build 7?")
        assert await frame.evaluate(text_of("#note")) == "Answer it in the chat."
        assert await frame.evaluate("document.querySelector('#card').getBoundingClientRect().height") <= 160
        answer = {"task_id": started.structured_content["task_id"], "key": "deploy", "action": "accept"}
        assert not (await host.client.call_tool("answer_task_input", answer)).is_error
        await frame.until(f"{text_of('#state')} === 'completed'")
        assert await frame.evaluate("document.querySelector('#question').hidden")


async def test_a_host_that_hands_no_calls_on_shows_what_the_tool_answered(tmp_path: Path) -> None:
    async with host_with_a_server(tmp_path) as (host, _):
        frame = await host.show(await start(host), given={"title": "Index the documents"}, proxies=False)
        await frame.until(f"['pending', 'preparing', 'running'].includes({text_of('#state')})")
        assert await frame.evaluate(text_of("h1")) == "Index the documents"
        assert "does not keep the card up to date" in await frame.evaluate(text_of("#note"))
        assert await frame.evaluate("document.querySelector('#cancel').hidden")
        refused = await host.client.call_tool("get_task_execution_status", {"task_id": "no-such-task"})
        frame = await host.show(refused)
        await frame.until(f"{text_of('#message')}.includes('not found')")
        assert host.calls == []
