"""The other public names that the seed documents promise, each the real thing under a second name."""

from __future__ import annotations

from vespera_exec.app.executions.engine import DefaultExecutionEngine
from vespera_exec.app.executions.subscriptions import UpdateCallback
from vespera_exec.model.capacity import Allocation, CapacityRequirement
from vespera_exec.model.enums import EventType
from vespera_exec.model.events import ExecutionEvent
from vespera_exec.model.plans.plan import PlanStep
from vespera_exec.model.session import ExecutionSession
from vespera_exec.model.timing import TimeTracking
from vespera_exec.monitoring.eta import NaiveEstimator

StatusEvent = ExecutionEvent
ExecutionEventType = EventType
ExecutionRecord = ExecutionSession
Execution = ExecutionSession
TimeTracker = TimeTracking
ExecutionManager = DefaultExecutionEngine
AsyncExecutionService = DefaultExecutionEngine
PipelineRunner = DefaultExecutionEngine
ExecutionEventCallback = UpdateCallback
Step = PlanStep
Resource = Allocation
ResourceRequirement = CapacityRequirement
ETACalculator = NaiveEstimator
