"""The plan format: its JSON schema, and the way from what a file or a call says to a checked plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from roles.inputs import near
from vespera_exec.errors import InvalidInput, InvalidPlan
from vespera_exec.model import capacity as capacities
from vespera_exec.model.inputs import MAX_MESSAGE_CHARACTERS
from vespera_exec.model.plans.check import (
    ID_PATTERN,
    ID_RULE,
    MAX_DESCRIPTION,
    MAX_PROBLEMS,
    MAX_RETRIES,
    MAX_SECONDS,
    MAX_TITLE,
    MAX_WEIGHT,
    checked,
)
from vespera_exec.model.plans.plan import MAX_PARALLEL, MAX_STEPS, ExecutionPlan, Fallback, PlanStep, StepRetries
from vespera_exec.model.plans.references import Reference, references

Json = Any

_UNREAD: Final = "unread"
_WORDS: Final = {
    "missing": "is missing",
    "model_type": "should be an object",
    "model_attributes_type": "should be an object",
    "dict_type": "should be an object",
    "list_type": "should be a list",
    "string_type": "should be a text",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "finite_number": "should be a finite number",
    "string_too_short": "is empty",
    "string_pattern_mismatch": f"should be {ID_RULE}",
}
"""What a kind of fault is called, where the validator's own words are not plain."""
_SYNONYMS: Final = {"needs": "depends_on", "requires_approval": "approval"}

Id = Annotated[str, Field(pattern=ID_PATTERN)]
Question = Annotated[str, Field(min_length=1, max_length=MAX_MESSAGE_CHARACTERS)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _name_alone(given: Json) -> Json:
    return {"role": given} if isinstance(given, str) else given


def _number_alone(given: Json) -> Json:
    return {"max_retries": given} if isinstance(given, int) and not isinstance(given, bool) else given


def _approval(given: Json) -> Json:
    if isinstance(given, bool) or (isinstance(given, str) and 0 < len(given) <= MAX_MESSAGE_CHARACTERS):
        return given
    raise ValueError(f"should be true, or a text of 1 to {MAX_MESSAGE_CHARACTERS} characters")


def _capacity(given: Json) -> Json:
    try:
        return capacities.requirements(given)
    except InvalidInput as error:
        raise ValueError(error.message.removeprefix("capacity ")) from None


class RetriesSpec(_Part):
    """When a failed attempt of a step is followed by another."""

    max_retries: Annotated[int, Field(ge=0, le=MAX_RETRIES)] = 0
    """How many more attempts."""
    retry_on: list[str] = []
    """The error codes that are tried again; empty: every error that another attempt may help against."""
    backoff_seconds: Seconds = 1.0
    """Before the second attempt."""
    backoff_factor: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)] = 2.0
    """How much longer each further wait is."""
    backoff_max_seconds: Seconds = 60.0
    """The longest wait."""

    def retries(self) -> StepRetries:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        given["retry_on"] = tuple(self.retry_on)
        return StepRetries(**given)


class FallbackSpec(_Part):
    """Who does the step when it has failed."""

    role: Annotated[str, Field(min_length=1)]
    inputs: dict[str, Json] | None = None
    """In the place of the inputs of the step."""


_CAPACITY_SCHEMA: Final[dict[str, Json]] = {
    "default": [],
    "anyOf": [
        {"type": "null"},
        {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
        {
            "type": "array",
            "maxItems": capacities.MAX_REQUIREMENTS,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "amount"],
                "properties": {
                    "type": {"type": "string", "pattern": f"^{capacities.NAME.pattern}$"},
                    "amount": {"type": "number", "exclusiveMinimum": 0},
                    "priority": {"type": "integer", "minimum": 0, "maximum": 10, "default": 5},
                    "duration_ms": {"type": ["number", "null"], "minimum": 0},
                    "constraints": {"type": "object"},
                },
            },
        },
    ],
}


def _or(schema: dict[str, Json], *others: dict[str, Json]) -> None:
    """Let the property be one of `others`, too."""
    kept = {key: schema.pop(key) for key in list(schema) if key not in ("description", "default", "title")}
    alternatives = kept.pop("anyOf", None) or [kept]
    schema["anyOf"] = [*others, *alternatives]


def _step_schema(schema: dict[str, Json]) -> None:
    properties = schema["properties"]
    _or(properties["retries"], {"type": "integer", "minimum": 0, "maximum": MAX_RETRIES})
    _or(properties["fallback"], {"type": "string", "minLength": 1})
    for synonym, name in _SYNONYMS.items():
        properties[synonym] = {**properties[name], "description": f"The same as {name}."}
    schema["not"] = {"anyOf": [{"required": [synonym, name]} for synonym, name in _SYNONYMS.items()]}


class StepSpec(_Part):
    """One step of a plan."""

    model_config = ConfigDict(json_schema_extra=_step_schema)

    id: Id
    """Unique in the plan; references name it."""
    role: Annotated[str, Field(min_length=1)]
    """Who does it."""
    title: Annotated[str, Field(max_length=MAX_TITLE)] = ""
    """Shown; the id where it is empty."""
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] = ""
    """What the role is told."""
    type: Annotated[str, Field(max_length=64)] = ""
    """A label of yours, by which statistics are grouped."""
    depends_on: list[str] = []
    """Steps that have to end well before it begins; those that its inputs refer to need not be named."""
    inputs: dict[str, Json] = {}
    """Of the role; texts may hold references."""
    timeout_seconds: Seconds = 0.0
    """Of each attempt; 0: as the role says."""
    wait_timeout_seconds: Seconds = 0.0
    """How long it may wait for a slot, for capacity or for an answer; 0: as the role says."""
    retries: Annotated[RetriesSpec | None, BeforeValidator(_number_alone)] = None
    """Further attempts after a failure, or only their number; without it, as the role says."""
    fallback: Annotated[FallbackSpec | None, BeforeValidator(_name_alone)] = None
    """A role, or a role and its inputs, that does the step once all attempts have failed."""
    approval: Annotated[bool | Question, BeforeValidator(_approval)] = False
    """A person has to approve before it begins; a text is what they are asked."""
    capacity: Annotated[Any, BeforeValidator(_capacity), WithJsonSchema(_CAPACITY_SCHEMA)] = ()
    """What it needs of the shared capacity while it works, `{type: amount}` or a list."""
    continue_on_failure: bool = False
    """Its failure does not stop what depends on it; references to its output give null then."""
    recovery: list[str] | None = None
    """Ids of the recovery strategies that may decide about its failures; without it, all."""
    on_interrupt: Literal["fail", "resume"] | None = None
    """What becomes of it when the server dies at its work; without it, as the role says."""
    weight: Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0
    """Of its progress in that of the plan; 0 leaves it out."""
    cache: bool = True
    """Its output may come from an earlier execution with the same inputs, where its role is pure."""

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, given: Json) -> Json:
        if not isinstance(given, Mapping):
            return given
        named = cast("Mapping[str, Json]", given)
        both = [
            f"{synonym} is the same as {name}" for synonym, name in _SYNONYMS.items() if {synonym, name} <= {*named}
        ]
        if both:
            raise ValueError(f"{'; '.join(both)}: give one of them")
        return {_SYNONYMS.get(key, key): value for key, value in named.items()}

    def step(self) -> PlanStep:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        given["depends_on"] = tuple(self.depends_on)
        given["recovery"] = None if self.recovery is None else tuple(self.recovery)
        if self.retries is not None:
            given["retries"] = self.retries.retries()
        if self.fallback is not None:
            given["fallback"] = Fallback(role=self.fallback.role, inputs=self.fallback.inputs)
        return PlanStep(**given)


class PlanHead(_Part):
    """What a plan says of itself, beside its steps."""

    name: Annotated[str, Field(max_length=MAX_TITLE)] = ""
    """Shown."""
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] = ""
    """What it is for."""
    variables: dict[str, Json] = {}
    """Names and values that references read; whoever starts the plan may give others."""
    max_parallel: Annotated[int, Field(ge=1, le=MAX_PARALLEL)] = 16
    """How many of its steps may be under way at a time."""
    on_failure: Literal["continue", "abort"] = "continue"
    """Whether the first step that fails for good stops the others, too."""
    timeout_seconds: Seconds = 0.0
    """Of the whole; 0: none."""
    checkpoint_interval_seconds: Seconds = 0.0
    """Between periodic checkpoints; 0: none."""
    step_checkpoints: bool = True
    """A checkpoint at the end of each step that was done or has failed."""
    output: Json = None
    """A template with references: what the plan returns. Without it, the outputs of the steps nothing depends on."""


class PlanSpec(PlanHead):
    """A plan: steps, what each needs of the others, and how the whole is to be run."""

    steps: Annotated[list[StepSpec], Field(min_length=1, max_length=MAX_STEPS)]


def plan_schema() -> dict[str, Json]:
    """The plan format as a JSON schema, complete in itself."""
    schema = PlanSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "vespera-exec plan"}


def parse_plan(data: object, *, variables: Mapping[str, Json] | None = None) -> ExecutionPlan:
    """The plan that `data` describes, checked. `variables` take the place of the plan's own of these names.

    Raises:
        InvalidPlan: all that is wrong with it, each with the id of its step.
    """
    if not isinstance(data, Mapping):
        raise InvalidPlan([(None, "a plan is an object with `steps`")])
    return _Reading(cast("Mapping[str, Json]", data), variables or {}).plan()


class _Reading:
    """What can be read of a plan is checked also where the rest of it cannot be."""

    def __init__(self, data: Mapping[str, Json], variables: Mapping[str, Json]) -> None:
        self._data = data
        self._given = variables
        self._problems: list[tuple[str | None, str]] = []

    def plan(self) -> ExecutionPlan:
        head = self._head()
        steps = self._steps()
        if head is None or not steps:
            raise InvalidPlan(self._problems)
        told = {name: getattr(head, name) for name in PlanHead.model_fields}
        told["variables"] = {**head.variables, **self._given}
        plan = ExecutionPlan(id="", steps=tuple(steps), **told)
        self._unused_variables(plan, head)
        try:
            made = checked(plan)
        except InvalidPlan as error:
            raise InvalidPlan([*self._problems, *error.problems]) from None
        if self._problems:
            raise InvalidPlan(self._problems)
        return made

    def _head(self) -> PlanHead | None:
        """Without what cannot be read of it; None where that is the variables, which the rest is checked against."""
        told = {key: value for key, value in self._data.items() if key != "steps"}
        try:
            return PlanHead.model_validate(told)
        except ValidationError as error:
            self._tell(None, error, PlanSpec)
            bad = {each["loc"][0] for each in error.errors(include_url=False)}
            readable = {key: value for key, value in told.items() if key not in bad}
            return None if "variables" in bad else PlanHead.model_validate(readable)

    def _steps(self) -> list[PlanStep]:
        given = self._data.get("steps")
        if not isinstance(given, list) or not given:
            self._problems.append((None, "steps: a plan has a list of steps, at least one"))
            return []
        entries = cast("list[Json]", given)
        if len(entries) > MAX_STEPS:
            self._problems.append((None, f"steps: there are {len(entries):,}; at most {MAX_STEPS:,}"))
            return []
        return [step for position, each in enumerate(entries) if (step := self._step(position, each)) is not None]

    def _step(self, position: int, given: Json) -> PlanStep | None:
        """In the place of one that cannot be read, one of the same name that nothing is wrong with."""
        try:
            return StepSpec.model_validate(given).step()
        except ValidationError as error:
            named = cast("Mapping[str, Json]", given).get("id") if isinstance(given, Mapping) else None
            step_id = named if isinstance(named, str) and named else None
            self._tell(step_id, error, StepSpec, place="" if step_id else f"steps[{position}].")
            return None if step_id is None else PlanStep(id=step_id, role=_UNREAD)

    def _tell(self, step: str | None, error: ValidationError, kind: type[BaseModel], *, place: str = "") -> None:
        for each in error.errors(include_url=False, include_context=False, include_input=False):
            if len(self._problems) < MAX_PROBLEMS:
                self._problems.append((step and step[:80], _told(each["type"], each["loc"], each["msg"], kind, place)))

    def _unused_variables(self, plan: ExecutionPlan, head: PlanHead) -> None:
        """A name that is misspelt is given, and nothing has it."""
        if not (unknown := self._given.keys() - head.variables.keys()):
            return
        used = {each.name for each in _all_references(plan) if each.kind == "variable"}
        for name in sorted(unknown - used):
            known = sorted({*head.variables, *used})
            self._problems.append((None, f"variables: the plan has no variable {name[:80]!r}{near(name, known)}"))


def _told(kind: str, path: tuple[str | int, ...], message: str, model: type[BaseModel], place: str) -> str:
    where = place + "".join(f"[{each}]" if isinstance(each, int) else f".{each[:80]}" for each in path).lstrip(".")
    if kind == "extra_forbidden":
        key = str(path[-1])
        around = where.removesuffix(key[:80]).rstrip(".")
        return f"{around + ': ' if around else ''}unknown key {key[:80]!r}{near(key, _keys(model, path[:-1]))}"
    text = _WORDS.get(kind) or message.removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{where.rstrip('.')}: {text}" if where else text


def _keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    model = {"retries": RetriesSpec, "fallback": FallbackSpec}.get(str(path[0]), model) if path else model
    synonyms = _SYNONYMS if model is StepSpec else {}
    return [*model.model_fields, *synonyms]


def _all_references(plan: ExecutionPlan) -> list[Reference]:
    """Those that can be read; the others are told of by the check."""
    found: list[Reference] = []
    for value in (plan.output, *(each.inputs for each in plan.steps), *(each.fallback for each in plan.steps)):
        inputs = value.inputs if isinstance(value, Fallback) else value
        try:
            found += references(inputs)
        except InvalidInput:
            continue
    return found
