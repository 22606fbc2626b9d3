"""The public names of vespera-exec, each imported when it is first asked for.

Importing the package itself costs nothing: the bridge and the command line start with it.
"""

__version__ = "0.1.0"

# name -> module that defines it
_EXPORTS: dict[str, str] = {
    "AlreadyExecuting": "vespera_exec.errors",
    "AsyncExecutionService": "vespera_exec.aliases",
    "Caller": "vespera_exec.model.principal",
    "CancellationException": "vespera_exec.errors",
    "CancellationToken": "vespera_exec.model.cancellation",
    "Clock": "vespera_exec.model.clock",
    "Conflict": "vespera_exec.errors",
    "DaemonUnavailable": "vespera_exec.errors",
    "DataDirectoryInUse": "vespera_exec.errors",
    "DefaultExecutionEngine": "vespera_exec.app.executions.engine",
    "ETACalculator": "vespera_exec.aliases",
    "Engine": "vespera_exec.engine.engine",
    "EnhancedTaskExecution": "vespera_exec.model.execution",
    "EventPage": "vespera_exec.app.views",
    "EventType": "vespera_exec.model.enums",
    "Execute": "vespera_exec.app.views",
    "Execution": "vespera_exec.aliases",
    "ExecutionCheckpoint": "vespera_exec.model.plans.restoring",
    "ExecutionEngine": "vespera_exec.app.executions.engine",
    "ExecutionError": "vespera_exec.errors",
    "ExecutionEvent": "vespera_exec.model.events",
    "ExecutionEventCallback": "vespera_exec.aliases",
    "ExecutionEventType": "vespera_exec.aliases",
    "ExecutionManager": "vespera_exec.aliases",
    "ExecutionMessage": "vespera_exec.app.executions.result",
    "ExecutionMetrics": "vespera_exec.app.executions.result",
    "ExecutionNotFound": "vespera_exec.errors",
    "ExecutionPhase": "vespera_exec.model.enums",
    "ExecutionPlan": "vespera_exec.model.plans.plan",
    "ExecutionProgress": "vespera_exec.app.executions.result",
    "ExecutionRecord": "vespera_exec.aliases",
    "ExecutionResult": "vespera_exec.app.executions.result",
    "ExecutionSession": "vespera_exec.model.session",
    "ExecutionState": "vespera_exec.model.plans.restoring",
    "ExecutionStatus": "vespera_exec.model.enums",
    "ExecutionUpdate": "vespera_exec.app.executions.result",
    "Fallback": "vespera_exec.model.plans.plan",
    "Handle": "vespera_exec.app.views",
    "IOTracker": "vespera_exec.monitoring.own_process",
    "InvalidInput": "vespera_exec.errors",
    "InvalidPlan": "vespera_exec.errors",
    "InvalidProgress": "vespera_exec.errors",
    "InvalidReference": "vespera_exec.errors",
    "InvalidRoleFile": "vespera_exec.errors",
    "InvalidTransitionError": "vespera_exec.errors",
    "Job": "vespera_exec.engine.jobs",
    "Lifecycle": "vespera_exec.model.lifecycle",
    "MemoryTracker": "vespera_exec.monitoring.own_process",
    "MessageLevel": "vespera_exec.model.enums",
    "Metrics": "vespera_exec.app.views",
    "MissingReference": "vespera_exec.errors",
    "NaiveEstimator": "vespera_exec.monitoring.eta",
    "NewTask": "vespera_exec.app.views",
    "NotExecuting": "vespera_exec.errors",
    "NotFound": "vespera_exec.errors",
    "PauseUnsupported": "vespera_exec.errors",
    "PerformanceProfiler": "vespera_exec.model.profile",
    "PermissionDenied": "vespera_exec.errors",
    "PhaseManager": "vespera_exec.model.phases",
    "PhaseRecord": "vespera_exec.model.stays",
    "PipelineRunner": "vespera_exec.aliases",
    "PlanStep": "vespera_exec.model.plans.plan",
    "Policy": "vespera_exec.engine.jobs",
    "Progress": "vespera_exec.model.progress",
    "ProgressInfo": "vespera_exec.app.views",
    "ProgressReport": "vespera_exec.model.progress",
    "ProgressState": "vespera_exec.model.progress",
    "ProgressType": "vespera_exec.model.enums",
    "RecoveryAction": "vespera_exec.model.enums",
    "RecoveryContext": "vespera_exec.engine.plans.strategies",
    "RecoveryResult": "vespera_exec.engine.plans.strategies",
    "RecoveryStrategy": "vespera_exec.engine.plans.strategies",
    "Resource": "vespera_exec.aliases",
    "ResourceMonitor": "vespera_exec.monitoring.own_process",
    "ResourceRequirement": "vespera_exec.aliases",
    "ResourceType": "vespera_exec.model.enums",
    "ResourceUsage": "vespera_exec.app.executions.result",
    "Result": "vespera_exec.app.views",
    "RoleNotFound": "vespera_exec.errors",
    "Settings": "vespera_exec.settings",
    "Status": "vespera_exec.app.views",
    "StatusEvent": "vespera_exec.aliases",
    "StatusEventStream": "vespera_exec.model.stream",
    "Step": "vespera_exec.aliases",
    "StepRetries": "vespera_exec.model.plans.plan",
    "StepStatus": "vespera_exec.model.enums",
    "StoreDamaged": "vespera_exec.errors",
    "StoreError": "vespera_exec.errors",
    "StoreTooNew": "vespera_exec.errors",
    "StoreUnavailable": "vespera_exec.errors",
    "Task": "vespera_exec.model.task",
    "TaskExecution": "vespera_exec.model.execution",
    "TaskNotFound": "vespera_exec.errors",
    "TaskStatus": "vespera_exec.model.enums",
    "TimeTracker": "vespera_exec.aliases",
    "TimeTracking": "vespera_exec.model.timing",
    "UsageSampler": "vespera_exec.monitoring.sampler",
    "Vespera": "vespera_exec.app.service",
    "VesperaError": "vespera_exec.errors",
    "Work": "vespera_exec.engine.work",
    "WorkResult": "vespera_exec.engine.work",
    "Role": "roles.definition",
    "RoleExecutor": "roles.execution",
    "RoleRegistry": "roles.registry",
}

# Named for its readers only; the list itself is `_EXPORTS`.
__all__ = ["__version__", *sorted(_EXPORTS)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
