"""A plan file: what may stand in it, what each field means, and how a wrong one is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vespera_exec.app.plans.files import parse_plan, plan_schema
from vespera_exec.app.plans.source import MAX_BYTES, plan_data, read_plan_file
from vespera_exec.errors import InvalidInput, InvalidPlan
from vespera_exec.model.capacity import CapacityRequirement
from vespera_exec.model.plans.plan import ExecutionPlan, Fallback, PlanStep, StepRetries

WHOLE = b"""\
name: release
description: Look, build, check, publish
variables: {repo: vespera, targets: [linux, darwin]}
max_parallel: 4
on_failure: abort
timeout_seconds: 3600
checkpoint_interval_seconds: 60
step_checkpoints: false
output:
  wheel: ${steps.build.output.wheel}
  notes: "Released ${variables.repo}"
steps:
  - id: survey
    role: survey
    inputs: {path: "${variables.repo}"}
    cache: false
  - id: build
    role: builder
    title: Build the wheel
    description: With the release flags
    type: build
    inputs:
      files: ${steps.survey.output.files}
      shell: "echo $${HOME}"
    timeout_seconds: 600
    wait_timeout_seconds: 30
    retries: {max_retries: 2, retry_on: [NETWORK_TIMEOUT], backoff_seconds: 5, backoff_factor: 3,
              backoff_max_seconds: 50}
    fallback: {role: slow_builder, inputs: {files: "${steps.survey.output.files}"}}
    capacity:
      - {type: cpu, amount: 2, priority: 8, duration_ms: 60000, constraints: {min_cores: 4}}
      - {type: memory, amount: 512}
    recovery: [network_timeout_recovery]
    on_interrupt: resume
    weight: 3
  - id: publish
    role: publisher
    needs: [build]
    requires_approval: Publish it?
    retries: 1
    fallback: manual_publisher
    capacity: {api: 1}
    continue_on_failure: true
"""


def problems(data: object, **more: Any) -> list[tuple[str | None, str]]:
    with pytest.raises(InvalidPlan) as caught:
        parse_plan(data, **more)
    return list(caught.value.problems)


def plan(*steps: Any, **more: Any) -> dict[str, Any]:
    return {"steps": list(steps), **more}


def step(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"id": name, "role": "build", **more}


def refused(text: bytes, file: str = "p.yaml") -> str:
    with pytest.raises(InvalidPlan) as caught:
        plan_data(text, file=file)
    return caught.value.message


def is_valid(data: Any) -> bool:
    validator: Any = jsonschema.Draft202012Validator(plan_schema())
    return validator.is_valid(data)


def test_the_whole_format_becomes_a_plan() -> None:
    made = parse_plan(plan_data(WHOLE, file="release.yaml"))
    assert made == ExecutionPlan(
        id=made.id,
        name="release",
        description="Look, build, check, publish",
        variables={"repo": "vespera", "targets": ["linux", "darwin"]},
        max_parallel=4,
        on_failure="abort",
        timeout_seconds=3600,
        checkpoint_interval_seconds=60,
        step_checkpoints=False,
        output={"wheel": "${steps.build.output.wheel}", "notes": "Released ${variables.repo}"},
        steps=(
            PlanStep(id="survey", role="survey", inputs={"path": "${variables.repo}"}, cache=False),
            PlanStep(
                id="build",
                role="builder",
                title="Build the wheel",
                description="With the release flags",
                type="build",
                depends_on=("survey",),
                inputs={"files": "${steps.survey.output.files}", "shell": "echo $${HOME}"},
                timeout_seconds=600,
                wait_timeout_seconds=30,
                retries=StepRetries(
                    max_retries=2,
                    retry_on=("NETWORK_TIMEOUT",),
                    backoff_seconds=5,
                    backoff_factor=3,
                    backoff_max_seconds=50,
                ),
                fallback=Fallback(role="slow_builder", inputs={"files": "${steps.survey.output.files}"}),
                capacity=(
                    CapacityRequirement(
                        type="cpu", amount=2, priority=8, duration_ms=60000, constraints={"min_cores": 4}
                    ),
                    CapacityRequirement(type="memory", amount=512),
                ),
                recovery=("network_timeout_recovery",),
                on_interrupt="resume",
                weight=3,
            ),
            PlanStep(
                id="publish",
                role="publisher",
                depends_on=("build",),
                approval="Publish it?",
                retries=StepRetries(max_retries=1),
                fallback=Fallback(role="manual_publisher"),
                capacity=(CapacityRequirement(type="api", amount=1),),
                continue_on_failure=True,
            ),
        ),
    )
    assert made.id


def test_what_is_left_out_has_the_defaults_of_the_model() -> None:
    made = parse_plan(plan(step()))
    assert made == ExecutionPlan(id=made.id, steps=(PlanStep(id="a", role="build"),))


def test_the_schema_is_one_document_that_says_what_each_field_is() -> None:
    schema = plan_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["required"]) == {"steps"}
    for kind in (schema, *schema["$defs"].values()):
        assert kind["additionalProperties"] is False
        for name, told in kind["properties"].items():
            assert told.get("description") or told.get("$ref") or name in ("steps", "role"), name
    refs = [text for text in json.dumps(schema).split('"') if text.startswith("#/")]
    assert refs
    assert all(ref.removeprefix("#/$defs/") in schema["$defs"] for ref in refs)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"retries": 2},
        {"retries": {"max_retries": 1}},
        {"fallback": "other"},
        {"fallback": {"role": "other", "inputs": {"x": 1}}},
        {"approval": True},
        {"approval": "Go on?"},
        {"requires_approval": True},
        {"needs": []},
        {"capacity": None},
        {"capacity": {"cpu": 1}},
        {"capacity": [{"type": "cpu", "amount": 0.5}]},
        {"recovery": []},
        {"on_interrupt": "fail"},
        {"weight": 0},
    ],
)
def test_schema_and_reader_accept_the_same(more: dict[str, Any]) -> None:
    parse_plan(plan(step(**more)))
    assert is_valid(plan(step(**more)))


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"timeout": 5}, "unknown key 'timeout'; did you mean 'timeout_seconds'?"),
        ({"need": []}, "unknown key 'need'; did you mean 'needs'?"),
        ({"needs": [], "depends_on": []}, "needs is the same as depends_on: give one of them"),
        ({"timeout_seconds": "5"}, "timeout_seconds: should be a number"),
        ({"timeout_seconds": -1}, "timeout_seconds: should be greater than or equal to 0"),
        ({"timeout_seconds": True}, "timeout_seconds: should be a number"),
        ({"retries": -1}, "retries.max_retries: should be greater than or equal to 0"),
        ({"retries": 1.5}, "retries: should be an object"),
        ({"retries": {"max_retry": 1}}, "retries: unknown key 'max_retry'; did you mean 'max_retries'?"),
        ({"fallback": {"inputs": {}}}, "fallback.role: is missing"),
        ({"fallback": ""}, "fallback.role: is empty"),
        ({"approval": ""}, "approval: should be true, or a text of 1 to 2000 characters"),
        ({"approval": 1}, "approval: should be true, or a text of 1 to 2000 characters"),
        ({"capacity": {"cpu": 0}}, "capacity: cpu: the amount is a number from 1e-06 to 1e+12, not 0"),
        ({"capacity": [{"type": "cpu", "amount": 1, "priority": 11}]}, "capacity: cpu: priority is 0 to 10, not 11"),
        ({"continue_on_failure": "yes"}, "continue_on_failure: should be true or false"),
        ({"recovery": "x"}, "recovery: should be a list"),
        ({"depends_on": "b"}, "depends_on: should be a list"),
        ({"on_interrupt": "retry"}, "on_interrupt: should be 'fail' or 'resume'"),
        ({"weight": -1}, "weight: should be greater than or equal to 0"),
        ({"inputs": []}, "inputs: should be an object"),
        ({"id": "3a"}, "id: should be a letter, then letters, digits, _ or -, at most 64"),
    ],
)
def test_a_fault_of_form_names_its_step_and_field(more: dict[str, Any], problem: str) -> None:
    wrong = step("b", **{key: value for key, value in more.items() if key != "id"}) | {
        key: value for key, value in more.items() if key == "id"
    }
    assert problems(plan(wrong))[0] == (wrong["id"], problem)
    assert not is_valid(plan(wrong))


def test_every_fault_is_told_those_of_form_and_those_of_sense() -> None:
    found = problems(
        plan(
            step("a", timeout=1, retries="x"),
            step("b", needs=["ghost"]),
            {"role": "x"},
            "nonsense",
            step("c", inputs={"x": "${steps.a.output}", "y": "${steps.d.output}"}),
            nam="x",
            max_parallel=0,
        )
    )
    assert found == [
        (None, "max_parallel: should be greater than or equal to 1"),
        (None, "unknown key 'nam'; did you mean 'name'?"),
        ("a", "retries: should be an object"),
        ("a", "unknown key 'timeout'; did you mean 'timeout_seconds'?"),
        (None, "steps[2].id: is missing"),
        (None, "steps[3]: should be an object"),
        ("b", "depends_on: there is no step 'ghost'"),
        ("c", "inputs: ${steps.d.output} refers to a step that the plan does not have"),
    ]


@pytest.mark.parametrize("data", [None, [], "steps", 5, {}, {"steps": []}, {"steps": {}}, {"steps": None}])
def test_what_is_no_plan_at_all_is_refused(data: object) -> None:
    ((where, what),) = problems(data)
    assert where is None
    assert "steps" in what


def test_given_variables_take_the_place_of_the_plans_own() -> None:
    data = plan(step(inputs={"x": "${variables.repo}"}), variables={"repo": "a", "other": 1})
    assert parse_plan(data, variables={"repo": "b"}).variables == {"repo": "b", "other": 1}
    without = plan(step(inputs={"x": "${variables.repo}"}))
    assert problems(without) == [("a", "inputs: ${variables.repo} refers to a variable that the plan does not have")]
    assert parse_plan(without, variables={"repo": "b"}).variables == {"repo": "b"}


def test_a_misspelt_variable_is_noticed() -> None:
    data = plan(step(inputs={"x": "${variables.repo}"}), variables={"repo": "a"})
    assert problems(data, variables={"rep": "b"}) == [
        (None, "variables: the plan has no variable 'rep'; did you mean 'repo'?")
    ]


def test_a_fallback_and_the_output_may_use_a_variable_too() -> None:
    data = plan(step(fallback={"role": "x", "inputs": {"y": "${variables.v}"}}), output="${variables.w}")
    assert parse_plan(data, variables={"v": 1, "w": 2}).variables == {"v": 1, "w": 2}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"name: x\nname: y\n", "p.yaml:2: the key 'name' stands here twice"),
        (b"a: &x 1\nb: *x\n", "p.yaml:1: anchors and aliases are not allowed"),
        (b"a: !!python/object:os.system 1\n", "p.yaml:1: tags are not allowed"),
        (b"a: [1\n", "p.yaml:2:"),
        (b"- a\n", "p.yaml:1: a plan file is a mapping of keys to values"),
        (b"", "p.yaml:1: a plan file is a mapping"),
        (b"a: " + b"[" * 33 + b"]" * 33, "p.yaml:1: nested deeper than 32"),
        (b"a: \xff\n", "p.yaml:1: not UTF-8"),
        (b"a: 1\nb: [.inf]\n", "p.yaml:2: '.inf' is no number of JSON"),
        (b"a: .NaN\n", "p.yaml:1: '.NaN' is no number of JSON"),
        (b"a: x\x07\n", "p.yaml:1: the control character 0x07 is not allowed"),
        (b"#" * (MAX_BYTES + 1), f"at most {MAX_BYTES} are allowed"),
    ],
)
def test_yaml_is_bounded_and_a_fault_is_told_with_its_line(text: bytes, problem: str) -> None:
    assert problem in refused(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' stands here twice"),
        (b'{"a": [}', "p.json:1: Expecting value"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": [1e999]}', "1e999 is no number"),
        (b'{"a": ["\\ud800"]}', "half a surrogate pair"),
        (b"[]", "a plan file is a mapping"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b" " * (MAX_BYTES + 1), "at most 4194304 are allowed"),
    ],
)
def test_json_is_bounded_too(text: bytes, problem: str) -> None:
    assert problem in refused(text, "p.json")


def test_a_file_is_read_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(WHOLE)
    (tmp_path / "p.json").write_text(json.dumps(plan_data(WHOLE, file="p.yaml")))
    assert read_plan_file(tmp_path / "p.yaml") == read_plan_file(tmp_path / "p.json")
    with pytest.raises(InvalidInput, match="cannot read"):
        read_plan_file(tmp_path / "none.yaml")
    with pytest.raises(InvalidInput, match=f"{tmp_path} is no file"):
        read_plan_file(tmp_path)


def test_hostile_files_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_bytes(b"a: " + b"[" * 2_000_000)
    (tmp_path / "big.yaml").write_bytes(b"x" * (3 * MAX_BYTES))
    (tmp_path / "bomb.json").write_bytes(b'{"a": ' + b"[" * 2_000_000)
    began = time.thread_time()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(InvalidPlan):
            read_plan_file(path)
    assert time.thread_time() - began < 10


def test_ten_thousand_steps_are_read_in_seconds() -> None:
    steps = [step(f"s{at}", inputs={"x": f"${{steps.s{at - 1}.output}}"} if at else {}) for at in range(10_000)]
    began = time.process_time()
    made = parse_plan(plan(*steps))
    assert time.process_time() - began < 4
    assert made.steps[-1].depends_on == ("s9998",)


_ROOT = Path(__file__).parents[2]
_DOC = (_ROOT / "docs" / "plans.md").read_text()


def test_the_example_of_the_docs_is_a_plan() -> None:
    text = _DOC.partition("```yaml\n")[2].partition("```")[0]
    made = parse_plan(plan_data(text.encode(), file="plan.yaml"))
    assert [each.id for each in made.steps] == ["survey", "lint", "test", "build", "publish"]
    assert made.steps[-1].depends_on == ("build", "survey")


def test_the_docs_name_every_field_with_its_default() -> None:
    schema = plan_schema()
    rows = {
        name.strip("` "): told.split("|")[0].strip("` ")
        for line in _DOC.splitlines()
        if line.startswith("| `")
        for names, _, told in [line.removeprefix("|").partition("|")]
        for name in names.split(", or ")
    }
    for properties in (schema["properties"], schema["$defs"]["StepSpec"]["properties"]):
        for name, told in properties.items():
            default = "required" if "default" not in told else json.dumps(told["default"]).removesuffix(".0")
            assert rows[name] in (default, default.strip('"')), name
    for name, told in schema["$defs"]["RetriesSpec"]["properties"].items():
        default = json.dumps(told["default"]).removesuffix(".0")
        assert f"`{name}` ({default})" in _DOC or f"`{name}` (`{default}`" in _DOC


@pytest.mark.parametrize("file", sorted(each.name for each in (_ROOT / "examples").glob("*.yaml")))
def test_the_examples_are_plans(file: str) -> None:
    data = read_plan_file(_ROOT / "examples" / file)
    assert "steps" not in data or parse_plan(data).steps


_FIELDS = [
    "id", "role", "inputs", "needs", "depends_on", "retries", "fallback", "approval", "capacity", "recovery", "weight",
    "timeout_seconds", "on_interrupt", "cache", "title", "x",
]  # fmt: skip
_keys = st.sampled_from(_FIELDS)
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(("a", "b", "${steps.a.output}", "${x", "fail")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys | st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)
_steps = st.fixed_dictionaries({"id": st.sampled_from(("a", "b", "c")), "role": st.just("r")}).flatmap(
    lambda base: st.dictionaries(_keys, _values, max_size=4).map(lambda more: {**base, **more})
)
_plans = st.dictionaries(
    st.sampled_from(("name", "variables", "output", "max_parallel", "on_failure", "x")), _values, max_size=3
).flatmap(lambda head: st.lists(_steps | _values, max_size=4).map(lambda steps: {**head, "steps": steps}))


@settings(max_examples=200, deadline=None)
@given(_plans | _values, st.dictionaries(st.text(max_size=4), _values, max_size=2))
def test_whatever_is_given_it_is_a_plan_or_told_why_not(data: Any, variables: dict[str, Any]) -> None:
    try:
        made = parse_plan(data, variables=variables)
    except InvalidPlan as error:
        told = error.to_dict()["problems"]
    else:
        told = [{"step": None, "problem": ""}]
        assert made.steps
        assert is_valid(data)
    assert told


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from(("p.yaml", "p.json")))
def test_whatever_stands_in_a_file_only_a_clear_refusal_escapes(data: bytes, file: str) -> None:
    try:
        found = plan_data(data, file=file)
    except InvalidPlan as error:
        found = {"refused": error.message}
    assert isinstance(found, dict)
