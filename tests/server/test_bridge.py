"""The bridge carries a client over the life and death of daemons, and repeats nothing but the handshake."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from deadlines import WITHIN
from echo_place import BRIDGE, HELLO, Client, Place, eventually

from vespera_exec import __version__, paths
from vespera_exec.server import bridge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RESTARTED = {"error_code": "DAEMON_RESTARTED", "retriable": True}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path / "data") as place:
        yield place


def test_bridge_imports_nothing_but_the_standard_library_and_three_modules_of_ours() -> None:
    script = (
        "import sys; before = set(sys.modules); from vespera_exec.cli import entry;"
        "from vespera_exec.server import bridge; print(*(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(out.split())
    ours = {name for name in loaded if name.startswith("vespera_exec")}
    foreign = {name for name in loaded - ours if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == set()
    assert ours == {
        "vespera_exec",
        "vespera_exec.cli",
        "vespera_exec.cli.entry",
        "vespera_exec.paths",
        "vespera_exec.server",
        "vespera_exec.server.bridge",
        "vespera_exec.server.greeting",
    }
    assert not loaded & {"asyncio", "dataclasses", "subprocess", "tempfile", "logging"}


def test_version_is_the_one_of_the_package() -> None:
    assert importlib.metadata.version("vespera-exec") == __version__


def test_first_client_starts_the_daemon_and_later_ones_share_it(place: Place) -> None:
    with place.bridge() as first, place.bridge() as second:
        one, two = first.call("look"), second.call("look")
        assert one["pid"] == two["pid"] != first.process.pid
        assert place.starts() == [one["pid"]]
        assert first.close() == (0, "")
        assert second.call("look")["pid"] == one["pid"]


def test_daemon_learns_where_the_client_stands_and_only_allowed_variables(place: Place, tmp_path: Path) -> None:
    place.environ |= {"VIRTUAL_ENV": "/some/venv", "AWS_SECRET_ACCESS_KEY": "hidden"}
    with place.bridge(cwd=tmp_path) as client:
        preamble = client.call("look")["preamble"]
    assert (preamble["vespera"], preamble["client"], preamble["version"]) == (1, "bridge", __version__)
    assert preamble["cwd"] == str(tmp_path)
    assert preamble["env"]["VIRTUAL_ENV"] == "/some/venv"
    assert set(preamble["env"]) <= set(paths.CALLER_ENV)


def test_requests_in_flight_when_the_daemon_dies_are_answered_as_retriable(place: Place) -> None:
    with place.bridge() as client:
        numbers = [client.request("hang"), client.request("hang"), client.request("crash")]
        answers = [client.read() for _ in numbers]
        assert [answer["id"] for answer in answers] == numbers
        assert {answer["error"]["code"] for answer in answers} == {-32603}
        assert all(answer["error"]["data"] == RESTARTED for answer in answers)


def test_after_a_crash_the_session_goes_on_with_its_handshake_and_without_repeated_requests(place: Place) -> None:
    with place.bridge() as client:
        client.send(HELLO)
        assert client.read()["id"] == 0
        client.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        before = client.call("look")
        hung, crashed = client.request("hang"), client.request("crash")
        assert [client.read()["id"], client.read()["id"]] == [hung, crashed]
        after = client.call("look")
        assert after["pid"] != before["pid"]
        assert after["seen"] == ["initialize", "notifications/initialized", "look"]


def test_a_daemon_may_take_longer_for_the_repeated_handshake_than_for_its_greeting(place: Place) -> None:
    hasty = BRIDGE.replace("bridge.main", "setattr(bridge, '_GREETING_SECONDS', 0.5) or bridge.main")
    with Client([sys.executable, "-P", "-c", hasty, *place.command], place.environ) as client:
        client.send(HELLO)
        assert client.read()["id"] == 0
        busy = place.data_dir / "busy"
        busy.touch()
        client.request("crash")
        assert client.read()["error"]["data"] == RESTARTED
        number = client.request("look")
        assert eventually(lambda: len(place.starts()) == 2)
        assert not eventually(lambda: False, within=0.8)
        busy.unlink()
        answer = client.read()
        assert (answer["id"], answer["result"]["seen"]) == (number, ["initialize", "look"])


def test_a_session_without_handshake_just_goes_on(place: Place) -> None:
    with place.bridge() as client:
        client.call("look")
        client.request("crash")
        assert client.read()["error"]["data"] == RESTARTED
        assert client.call("look")["seen"] == ["look"]


def test_a_killed_idle_daemon_is_replaced_without_waiting_for_the_client(place: Place) -> None:
    with place.bridge() as client:
        pid = client.call("look")["pid"]
        # The guard against a daemon that dies as soon as it serves is meant for the first second only.
        assert not eventually(lambda: False, within=1.1)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: len(place.starts()) == 2)
        assert client.call("look")["pid"] == place.starts()[1]


def test_an_orderly_stop_is_not_undone_until_the_client_asks_again(place: Place) -> None:
    with place.bridge() as client:
        client.call("look")
        assert not eventually(lambda: False, within=1.1)
        client.request("stop")
        assert client.read()["error"]["data"] == RESTARTED
        assert not eventually(lambda: len(place.starts()) > 1, within=0.5)
        assert client.call("look")["pid"] == place.starts()[1]


def test_a_daemon_that_dies_over_the_handshake_is_replaced_and_the_client_gets_one_answer(place: Place) -> None:
    place.data_dir.mkdir()
    (place.data_dir / "crash-on-initialize").write_text("")
    with place.bridge() as client:
        client.send(HELLO)
        answer = client.read()
        assert answer["id"] == 0
        assert answer["result"]["pid"] == place.starts()[1]
        client.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        assert client.call("look")["seen"] == ["initialize", "notifications/initialized", "look"]


def test_half_an_answer_of_a_dying_daemon_never_reaches_the_client(place: Place) -> None:
    with place.bridge() as client:
        number = client.request("half")
        answer = client.read()
        assert answer["id"] == number
        assert answer["error"]["data"] == RESTARTED


def test_a_cancelled_request_is_not_answered_when_the_daemon_dies(place: Place) -> None:
    with place.bridge() as client:
        number = client.request("hang")
        client.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": number}})
        crashed = client.request("crash")
        assert client.read()["id"] == crashed
        client.call("look")


def test_without_a_daemon_every_request_says_why(place: Place) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('the disk is full')"]
    with place.bridge(command) as client:
        for method in ("initialize", "tools/list"):
            number = client.request(method)
            answer = client.read()
            assert answer["id"] == number
            assert "the disk is full" in answer["error"]["message"]
            assert answer["error"]["data"] == {"error_code": "DAEMON_UNAVAILABLE", "retriable": True}
        code, said = client.close()
        assert code == 1
        assert said.startswith("vespera-exec: cannot reach the daemon")
        assert said.count("\n") == 1


# Fails while there is a file `broken`, and counts how often it was tried.
FAILING = """
import os, sys
folder, command = sys.argv[1], sys.argv[2:]
open(folder + "/tries", "a").write("x")
if os.path.exists(folder + "/broken"):
    sys.exit("broken")
os.execv(command[0], command)
"""


def failing(place: Place) -> list[str]:
    (place.data_dir.parent / "broken").touch()
    return [sys.executable, "-c", FAILING, str(place.data_dir.parent), *place.command]


def test_a_daemon_that_failed_to_start_once_is_tried_again_soon(place: Place) -> None:
    with place.bridge(failing(place)) as client:
        client.request("look")
        assert "error" in client.read()
        (place.data_dir.parent / "broken").unlink()
        assert eventually(lambda: answered(client))


def test_a_daemon_that_somebody_else_started_is_used_without_a_pause(place: Place) -> None:
    with place.bridge(failing(place)) as client:
        tries = place.data_dir.parent / "tries"
        assert eventually(lambda: not answered(client) and len(tries.read_text()) >= 3)
        tried = len(tries.read_text())
        with place.bridge() as other:  # the next try of the first would be in two seconds
            other.call("look")
            assert answered(client)
        assert len(tries.read_text()) == tried
        assert client.close()[1].count("\n") == 1  # the same reason is said once


def answered(client: Client) -> bool:
    client.request("look")
    return "result" in client.read()


def test_a_daemon_that_refuses_the_preamble_is_quoted(place: Place) -> None:
    place.data_dir.mkdir()
    (place.data_dir / "refuse").write_text("too old for you")
    with place.bridge() as client:
        client.request("tools/list")
        assert "too old for you (go away)" in client.read()["error"]["message"]
        assert client.close()[0] == 1


def test_piped_requests_are_answered_before_the_bridge_ends(place: Place) -> None:
    lines = [
        json.dumps({"jsonrpc": "2.0", "id": number, "method": method}) for number, method in ((1, "look"), (2, "slow"))
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", BRIDGE, *place.command],
        input="\n".join(lines),  # the last one without its end
        capture_output=True,
        text=True,
        env=place.environ,
        timeout=WITHIN,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers if "result" in answer] == [1, 2]
    assert done.returncode == 0


def test_piped_requests_are_answered_also_by_a_daemon_that_needs_time_for_the_first(place: Place) -> None:
    place.data_dir.mkdir()
    (place.data_dir / "busy").touch()
    with place.bridge() as client:
        client.request("first")
        client.request("slow")
        client.end_input()
        assert not eventually(lambda: client.process.poll() is not None, within=2.0)
        (place.data_dir / "busy").unlink()
        assert [client.read()["id"], client.read()["id"]] == [1, 2]
        assert client.process.wait(timeout=WITHIN) == 0


def test_the_end_of_input_ends_the_bridge_before_a_client_would_kill_it(place: Place) -> None:
    with place.bridge() as client:
        client.call("look")
        client.request("hang")
        began = time.monotonic()
        assert client.close() == (0, "")
        assert time.monotonic() - began < 10
    assert bridge._DRAIN_SECONDS < 2  # pyright: ignore[reportPrivateUsage]  # after which clients kill


def test_a_client_that_vanishes_ends_the_bridge(place: Place) -> None:
    with place.bridge() as client:
        client.call("look")
        client.stop_reading()
        client.request("look")
        assert client.process.wait(timeout=WITHIN) == 0


def test_sigterm_ends_the_bridge_at_once_and_leaves_the_daemon(place: Place) -> None:
    with place.bridge() as client:
        pid = client.call("look")["pid"]
        client.request("hang")
        client.process.terminate()
        assert client.process.wait(timeout=WITHIN) == -signal.SIGTERM
    with place.bridge() as client:
        assert client.call("look")["pid"] == pid


@pytest.mark.parametrize("over", ["pipe", "socketpair"])
def test_long_lines_pass_whole_in_both_directions(place: Place, over: str) -> None:
    with place.bridge(over=over) as client:
        assert client.call("look", text="y" * 4_000_000)["received"] > 4_000_000
        number = client.request("big", size=8_000_000)
        assert not eventually(lambda: False, within=0.1)  # the bridge meets a full pipe
        answer = client.read()
        assert (answer["id"], len(answer["result"]["text"])) == (number, 8_000_000)
        assert client.close() == (0, "")


def test_a_line_beyond_all_limits_is_refused_and_the_session_goes_on(place: Place) -> None:
    with place.bridge() as client:
        client.request("look", text="y" * (65 * 1024 * 1024))
        answer = client.read()
        assert (answer["id"], answer["error"]["code"]) == (None, -32600)
        assert client.call("look")["seen"] == ["look"]


def test_lines_that_are_no_requests_are_forwarded_untouched(place: Place) -> None:
    with place.bridge() as client:
        client.send({"jsonrpc": "2.0", "method": "notifications/something", "params": {"a": [1]}})
        assert client.call("look")["seen"] == ["notifications/something", "look"]


def test_console_script_without_a_terminal_is_the_bridge(place: Place) -> None:
    place.data_dir.mkdir()
    # A daemon that is there already: the console script has no way to be told of another command.
    daemon = subprocess.Popen(place.command, env=place.environ)
    assert eventually(lambda: bool(place.starts()) and place.socket_path.exists())
    script = "import sys; from vespera_exec.cli.entry import main; sys.argv[1:] = []; sys.exit(main())"
    line = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "look"}) + "\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        input=line,
        capture_output=True,
        text=True,
        env=place.environ,
        timeout=WITHIN,
    )
    daemon.kill()
    daemon.wait()
    assert json.loads(done.stdout)["result"]["pid"] == daemon.pid
    assert done.returncode == 0
