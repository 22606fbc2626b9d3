"""A role file is bounded data: what is wrong with it is told with file and line, and it can do no harm."""

from __future__ import annotations

import time

import pytest

from roles.definition import Permissions, RetryPolicy, Role
from roles.rolefile import parse_role
from vespera_exec.errors import InvalidInput, InvalidRoleFile
from vespera_exec.model.principal import Caller

WHOLE = b"""\
name: check
description: Run the tests of a folder
runner: process
argv: [pytest, -q, "{inputs.path}", "--maxfail={inputs.max_fail}", "{{literal}}"]
inputs:
  path: {type: path, default: ".", description: where}
  max_fail: {type: integer, default: 1, min: 1, max: 9}
  mode: {type: string, choices: [fast, slow]}
progress: [patterns, {regex: 'epoch (?P<done>[0-9]+) of (?P<total>[0-9]+)', kind: steps}]
timeout_seconds: 60
grace_seconds: 2
retry: {max_retries: 2, retry_on: [NETWORK_TIMEOUT], backoff_seconds: 0.5}
on_interrupt: resume
permissions: {principals: [local, ci], scopes: [run]}
env: {LEVEL: 3}
stdin: task
"""


def role(text: str | bytes, file: str = "check.yaml") -> Role:
    return parse_role(text.encode() if isinstance(text, str) else text, file=file)


def refused(text: str | bytes, file: str = "check.yaml") -> str:
    with pytest.raises(InvalidRoleFile) as caught:
        role(text, file)
    return str(caught.value)


def outcome(text: bytes) -> str:
    try:
        role(text)
    except InvalidRoleFile as error:
        return str(error)
    return ""


def process_role(*lines: str) -> str:
    return "\n".join(("name: check", "runner: process", "argv: [echo]", *lines))


def test_whole_file_becomes_a_role() -> None:
    made = role(WHOLE)
    assert (made.name, made.runner, made.source) == ("check", "process", "check.yaml")
    assert made.argv[2:] == ("{inputs.path}", "--maxfail={inputs.max_fail}", "{{literal}}")
    assert made.retry == RetryPolicy(max_retries=2, retry_on=("NETWORK_TIMEOUT",), backoff_seconds=0.5)
    assert made.permissions == Permissions(principals=("local", "ci"), scopes=("run",))
    assert (made.timeout_seconds, made.grace_seconds, made.on_interrupt) == (60, 2, "resume")
    assert (dict(made.env), made.stdin, made.patterns) == ({"LEVEL": "3"}, "task", True)
    assert made.own_patterns[0].kind == "steps"
    assert made.input_schema() == {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "path": {"type": "string", "format": "path", "description": "where", "default": "."},
            "max_fail": {"type": "integer", "default": 1, "minimum": 1, "maximum": 9},
            "mode": {"type": "string", "enum": ["fast", "slow"]},
        },
    }


def test_external_role_is_done_by_workers_that_it_may_name() -> None:
    made = role("name: check\nrunner: external\nworkers: {principals: [ann]}\nlease_seconds: 5")
    assert (made.runner, made.lease_seconds, made.argv, made.target) == ("external", 5, (), None)
    ann = Caller("ann", frozenset({"worker"}), over_tcp=True)
    assert made.admits(ann)
    assert not made.admits(Caller())
    anybody = role("name: check\nrunner: external")
    assert anybody.admits(ann)
    assert anybody.admits(Caller())
    assert not role(process_role()).admits(Caller())
    local = role("name: check\nrunner: external\nworkers: {principals: [local]}")
    assert local.admits(Caller())
    assert not local.admits(Caller("local", frozenset({"worker"}), over_tcp=True))


@pytest.mark.parametrize(
    "line",
    ["argv: [echo]", "target: a:b", "env: {A: b}", "stdin: task", "on_interrupt: resume", "approval: true"],
)
def test_what_needs_a_process_of_ours_does_not_fit_an_external_role(line: str) -> None:
    key = line.partition(":")[0]
    said = refused(f"name: check\nrunner: external\n{line}")
    assert said == f"check.yaml:3: a role with `runner: external` takes no `{key}`: its work is done elsewhere"


def test_a_program_cannot_define_an_approval_that_nobody_would_ask_for() -> None:
    with pytest.raises(InvalidInput, match="approval"):
        Role(name="check", runner="external", approval="May it?")


def test_what_is_for_workers_does_not_fit_another_role() -> None:
    assert "check.yaml:4: a role with `runner: process` takes no `lease_seconds`" in refused(
        process_role("lease_seconds: 5")
    )


def test_process_role_serves_our_own_uid_alone_unless_the_file_says_otherwise() -> None:
    made = role(process_role())
    assert made.permits(Caller())
    assert not made.permits(Caller("ci", frozenset({"read", "operate"}), over_tcp=True))
    assert not made.permits(Caller("local", frozenset({"read", "operate"}), over_tcp=True))


def test_python_role_serves_tokens_that_may_operate() -> None:
    made = role("name: check\ntarget: a.b:c")
    assert made.permits(Caller("ci", frozenset({"operate"}), over_tcp=True))
    assert not made.permits(Caller("ci", frozenset({"read"}), over_tcp=True))


@pytest.mark.promise("role_files")
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (b"name: check\nrunner: \xff\n", 2, "UTF-8"),
        ("name: check\n\ndescription: a\x07b", 3, "0x07"),
        ('name: check\ntarget: a:b\ndescription: "a\\0b"', 3, "0x00"),
        ("name: check\nname: check", 2, "twice"),
        ("name: check\ntarget: a:b\ninputs:\n  a: string\n  a: string", 5, "twice"),
        ("name: check\ntarget: a:b\ntimout_seconds: 3", 3, "did you mean 'timeout_seconds'?"),
        ("name: &anchor check", 1, "anchors"),
        ("name: check\ntarget: !!python/name:os.system a", 2, "tags"),
        ("name: check\ntarget: !!str a:b", 2, "tags"),
        ("name: check\n? [a, b]\n: c", 2, "plain word"),
        ("name: check\n1: c", 2, "plain word"),
        ("- a\n- b", 1, "mapping"),
        ("", 1, "mapping"),
        ("name: check\n---\nname: check", 2, ""),
        ("name: [", 2, "expected node"),
        ("name: check\ntarget: a:b\ninputs:\n  deep: " + "[" * 40 + "]" * 40, 4, "nested deeper"),
        ("name: other\ntarget: a:b", 1, "its file 'check'"),
        ("name: check\nrunner: shell", 2, "one of python, process"),
        ("name: check", 1, "`target`"),
        ("name: check\nrunner: process", 1, "`argv`"),
        ("name: check\nrunner: process\nargv: rm -rf /", 3, "never a shell line"),
        ("name: check\nrunner: process\nargv:\n  - '{inputs.program}'", 4, "takes no placeholder"),
        ("name: check\nrunner: process\nargv:\n  - echo\n  - '{inputs.pth}'\ninputs: {path: path}", 5, "did you mean"),
        ("name: check\nrunner: process\nargv: [echo, '{inputs.a}']\ninputs: {a: list}", 3, "one argument"),
        ("name: check\nrunner: process\nargv: [echo, '{HOME}']", 3, "write {{ and }}"),
        ("name: check\nrunner: process\nargv_input: argv\ninputs: {argv: list}", 3, "unknown key"),
        ("name: check\ntarget: 'a:b; import os'", 2, "neither module:callable"),
        (process_role("timeout_seconds: .nan"), 4, "'.nan' is no number"),
        (process_role("timeout_seconds: -1"), 4, "number from 0"),
        (process_role("grace_seconds: 30"), 4, "to 4"),
        (process_role("retry: {max_retries: 3}"), 4, "retry_on"),
        (process_role("env: {VESPERA_DATA_DIR: /}"), 4, "set by the server"),
        (process_role("env: {'A=B': c}"), 4, "name of a variable"),
        (process_role("progress:", "  - regex: '(a+)+$'"), 5, "inside a repetition"),
        (process_role("progress:", "  - regex: '.*.*x'"), 5, "more than one"),
        (process_role("progress:", "  - regex: 'x'"), 5, "name its groups"),
        (process_role("progress:", "  - regex: '(?P<percent>[0-9]+)'", "    kind: steps"), 6, "percent, not 'steps'"),
        (process_role("progress: [descripter]"), 4, "progress is"),
        (process_role("inputs:", "  A: string"), 5, "no input name"),
        (process_role("inputs:", "  a: strnig"), 5, "type must be one of"),
        (process_role("inputs:", "  a: {type: string, min: 3}"), 5, "does not fit"),
        (process_role("inputs:", "  a: {type: integer, default: x}"), 5, "default does not fit"),
        (process_role("inputs:", "  a: {type: integer, defualt: 1}"), 5, "did you mean 'default'?"),
        (process_role("inputs:", "  a: {type: string, pattern: '(b*)*'}"), 5, "inside a repetition"),
        (process_role("timeout_seconds: " + "9" * 5000), 4, "number"),
        (process_role("description: " + "x" * 5000), 4, "at most 4000"),
        (process_role("reads_paths: maybe"), 4, "true or false"),
        (process_role("target: a:b"), 4, "not a `target`"),
        (process_role("inputs: [a]"), 4, "inputs is a mapping"),
        (process_role("inputs:", "  a: [b]"), 5, "a mapping with a `type`"),
        (process_role("inputs:", "  a: {type: string, required: true, default: b}"), 5, "has no default"),
        (process_role("inputs:", "  a: {type: string, max_length: 0}"), 5, "at least 1"),
        (process_role("inputs:", "  a: {type: integer, choices: [b]}"), 5, "expected a integer"),
        (process_role("inputs:", "  a: {type: list, of: list}"), 5, "of must be one of"),
        (process_role("inputs:", "  a: {type: integer, min: b}"), 5, "min must be a number"),
        (process_role("inputs:", "  a: {type: string, required: 1}"), 5, "required must be a bool"),
        (process_role("permissions: {principals: local}"), 4, "list of words"),
        (process_role("progress: [{}]"), 4, "needs a `regex`"),
        (process_role("progress: [" + "{regex: '(?P<percent>1)'}, " * 9 + "]"), 4, "at most 8"),
        (process_role("env: {A: [b]}"), 4, "is a text"),
        ("name: check\ntarget: a:b\nargv: [echo]", 3, "not an `argv`"),
        ("name: check\nrunner: process\nargv: [echo, true]", 3, "quote it"),
        ("name: check\nrunner: process\nargv: ['']", 3, "no name"),
        ("name: check\nrunner: process\nargv: [" + "a, " * 300 + "]", 3, "at most 256"),
        ("name: Check\ntarget: a:b", 1, "no role name"),
    ],
)
def test_fault_is_told_with_file_and_line(text: str | bytes, line: int, message: str) -> None:
    told = refused(text)
    assert told.startswith(f"check.yaml:{line}: "), told
    assert message in told


@pytest.mark.promise("role_files")
def test_bombs_are_refused_at_once() -> None:
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + level)}: &{chr(98 + level)} [{','.join(['*' + chr(97 + level)] * 9)}]\n" for level in range(9)
    )
    bombs = [
        laughs.encode(),
        b"name: check\n" + b"[" * 60_000,
        b"name: check\n" + b"{" * 60_000,
        b"name: check\n" + b"? " * 30_000,
        b"name: check\n" + b"- " * 30_000,
        b"name: check\nx: " + b"'" * 60_001,
        b"name: check\n" + b"".join(b"k%d: 1\n" % number for number in range(7_000)),
        b"x" * (64 * 1024 + 1),
    ]
    for bomb in bombs:
        started = time.thread_time()
        refused(bomb)
        assert time.thread_time() - started < 2, bomb[:40]  # promised is a tenth of a second; lines may be traced


@pytest.mark.promise("role_files")
def test_thousand_hostile_names_are_refused() -> None:
    seeds = [
        "", "A", "1a", "-a", "_a", "a b", "a.b", "a/b", "../a", "/etc/passwd", "a\n", "a\tb", "ä", "a" * 65, "a\u202eb",
        "~", "NULL", "True", "${HOME}", "$(id)", "`id`", "a;b", "a|b", "a'b", "con:", "a\\b", "аdmin", ".", "..", "a*",
    ]  # fmt: skip
    names = [seed + tail for seed in seeds for tail in ("", "!", "/..", " ", "é", "#", "\u200b", "%00", "@", "a/")]
    names += [
        f"{prefix}{number}"
        for number in range(60)
        for prefix in ("../", "/", "A", "é", " ", ".", "-", "\u0661", "a/", "a b", "a..", "~")
    ]
    assert len(names) >= 1000
    for name in names:
        with pytest.raises(InvalidInput):
            Role(name=name)


@pytest.mark.promise("role_files")
def test_random_bytes_never_escape_as_another_error() -> None:
    for start in range(0, len(WHOLE), 3):
        for planted in (b"\x00", b"\xff", b"*", b"&a ", b"{", b"\n", b"!!python/object:os.system "):
            told = outcome(WHOLE[:start] + planted + WHOLE[start + 1 :])
            assert told == "" or told.startswith("check.yaml:")


def test_a_value_never_becomes_code_of_a_shell() -> None:
    head = "name: check\nrunner: process\ninputs: {x: {type: string, default: a}}\n"
    for argv in ('[sh, -c, "echo {inputs.x}"]', '[/bin/bash, -euc, "echo {inputs.x}"]', '[bash, -e, -c, "{inputs.x}"]'):
        assert "check.yaml:4: " in refused(f"{head}argv: {argv}\n")
    kept = role(head + 'argv: [sh, -c, \'echo "$1"\', sh, "{inputs.x}"]\n')
    assert kept.argv[-1] == "{inputs.x}"
