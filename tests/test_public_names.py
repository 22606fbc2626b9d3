"""The public names: pinned, lazy, and each what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import vespera_exec
from vespera_exec import aliases

PROMISED = [
    "AlreadyExecuting",
    "AsyncExecutionService",
    "Caller",
    "CancellationException",
    "CancellationToken",
    "Clock",
    "Conflict",
    "DaemonUnavailable",
    "DataDirectoryInUse",
    "DefaultExecutionEngine",
    "ETACalculator",
    "Engine",
    "EnhancedTaskExecution",
    "EventPage",
    "EventType",
    "Execute",
    "Execution",
    "ExecutionCheckpoint",
    "ExecutionEngine",
    "ExecutionError",
    "ExecutionEvent",
    "ExecutionEventCallback",
    "ExecutionEventType",
    "ExecutionManager",
    "ExecutionMessage",
    "ExecutionMetrics",
    "ExecutionNotFound",
    "ExecutionPhase",
    "ExecutionPlan",
    "ExecutionProgress",
    "ExecutionRecord",
    "ExecutionResult",
    "ExecutionSession",
    "ExecutionState",
    "ExecutionStatus",
    "ExecutionUpdate",
    "Fallback",
    "Handle",
    "IOTracker",
    "InvalidInput",
    "InvalidPlan",
    "InvalidProgress",
    "InvalidReference",
    "InvalidRoleFile",
    "InvalidTransitionError",
    "Job",
    "Lifecycle",
    "MemoryTracker",
    "MessageLevel",
    "Metrics",
    "MissingReference",
    "NaiveEstimator",
    "NewTask",
    "NotExecuting",
    "NotFound",
    "PauseUnsupported",
    "PerformanceProfiler",
    "PermissionDenied",
    "PhaseManager",
    "PhaseRecord",
    "PipelineRunner",
    "PlanStep",
    "Policy",
    "Progress",
    "ProgressInfo",
    "ProgressReport",
    "ProgressState",
    "ProgressType",
    "RecoveryAction",
    "RecoveryContext",
    "RecoveryResult",
    "RecoveryStrategy",
    "Resource",
    "ResourceMonitor",
    "ResourceRequirement",
    "ResourceType",
    "ResourceUsage",
    "Result",
    "Role",
    "RoleExecutor",
    "RoleNotFound",
    "RoleRegistry",
    "Settings",
    "Status",
    "StatusEvent",
    "StatusEventStream",
    "Step",
    "StepRetries",
    "StepStatus",
    "StoreDamaged",
    "StoreError",
    "StoreTooNew",
    "StoreUnavailable",
    "Task",
    "TaskExecution",
    "TaskNotFound",
    "TaskStatus",
    "TimeTracker",
    "TimeTracking",
    "UsageSampler",
    "Vespera",
    "VesperaError",
    "Work",
    "WorkResult",
    "__version__",
]


def test_the_public_names_are_exactly_these_and_each_can_be_had() -> None:
    assert sorted(vespera_exec.__all__) == sorted(PROMISED)
    for name in PROMISED:
        assert getattr(vespera_exec, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    stub = Path(vespera_exec.__file__).with_suffix(".pyi").read_text()
    seen = [
        alias.name for node in ast.walk(ast.parse(stub)) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted([*seen, "__version__"]) == sorted(PROMISED)


def test_an_alias_is_the_thing_itself() -> None:
    assert aliases.StatusEvent is vespera_exec.ExecutionEvent
    assert aliases.ExecutionEventType is vespera_exec.EventType
    assert issubclass(vespera_exec.EnhancedTaskExecution, vespera_exec.TaskExecution)
    for name in ("ExecutionManager", "AsyncExecutionService", "PipelineRunner"):
        assert getattr(vespera_exec, name) is vespera_exec.DefaultExecutionEngine
    assert vespera_exec.Step is vespera_exec.PlanStep


def test_the_engine_has_all_that_its_protocol_promises() -> None:
    promised: type[vespera_exec.ExecutionEngine] = vespera_exec.DefaultExecutionEngine  # the type checker's test
    names = [name for name in vars(vespera_exec.ExecutionEngine) if not name.startswith("_")]
    assert len(names) == 16
    assert all(callable(getattr(promised, name)) for name in names)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, vespera_exec; "
        "heavy = {'mcp', 'pydantic', 'anyio', 'orjson', 'starlette', 'rich', 'typer'} & set(sys.modules); "
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
