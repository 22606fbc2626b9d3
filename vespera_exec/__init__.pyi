"""What type checkers see of the lazy package; a test holds it against `_EXPORTS`."""

from roles.definition import Role as Role
from roles.execution import RoleExecutor as RoleExecutor
from roles.registry import RoleRegistry as RoleRegistry
from vespera_exec.aliases import (
    AsyncExecutionService as AsyncExecutionService,
    ETACalculator as ETACalculator,
    Execution as Execution,
    ExecutionEventCallback as ExecutionEventCallback,
    ExecutionEventType as ExecutionEventType,
    ExecutionManager as ExecutionManager,
    ExecutionRecord as ExecutionRecord,
    PipelineRunner as PipelineRunner,
    Resource as Resource,
    ResourceRequirement as ResourceRequirement,
    StatusEvent as StatusEvent,
    Step as Step,
    TimeTracker as TimeTracker,
)
from vespera_exec.app.executions.engine import (
    DefaultExecutionEngine as DefaultExecutionEngine,
    ExecutionEngine as ExecutionEngine,
)
from vespera_exec.app.executions.result import (
    ExecutionMessage as ExecutionMessage,
    ExecutionMetrics as ExecutionMetrics,
    ExecutionProgress as ExecutionProgress,
    ExecutionResult as ExecutionResult,
    ExecutionUpdate as ExecutionUpdate,
    ResourceUsage as ResourceUsage,
)
from vespera_exec.app.service import Vespera as Vespera
from vespera_exec.app.views import (
    EventPage as EventPage,
    Execute as Execute,
    Handle as Handle,
    Metrics as Metrics,
    NewTask as NewTask,
    ProgressInfo as ProgressInfo,
    Result as Result,
    Status as Status,
)
from vespera_exec.engine.engine import Engine as Engine
from vespera_exec.engine.plans.strategies import (
    RecoveryContext as RecoveryContext,
    RecoveryResult as RecoveryResult,
    RecoveryStrategy as RecoveryStrategy,
)
from vespera_exec.engine.jobs import Job as Job, Policy as Policy
from vespera_exec.engine.work import Work as Work, WorkResult as WorkResult
from vespera_exec.errors import (
    AlreadyExecuting as AlreadyExecuting,
    CancellationException as CancellationException,
    Conflict as Conflict,
    DaemonUnavailable as DaemonUnavailable,
    DataDirectoryInUse as DataDirectoryInUse,
    ExecutionError as ExecutionError,
    ExecutionNotFound as ExecutionNotFound,
    InvalidInput as InvalidInput,
    InvalidPlan as InvalidPlan,
    InvalidProgress as InvalidProgress,
    InvalidReference as InvalidReference,
    InvalidRoleFile as InvalidRoleFile,
    InvalidTransitionError as InvalidTransitionError,
    MissingReference as MissingReference,
    NotExecuting as NotExecuting,
    NotFound as NotFound,
    PauseUnsupported as PauseUnsupported,
    PermissionDenied as PermissionDenied,
    RoleNotFound as RoleNotFound,
    StoreDamaged as StoreDamaged,
    StoreError as StoreError,
    StoreTooNew as StoreTooNew,
    StoreUnavailable as StoreUnavailable,
    TaskNotFound as TaskNotFound,
    VesperaError as VesperaError,
)
from vespera_exec.model.cancellation import CancellationToken as CancellationToken
from vespera_exec.model.clock import Clock as Clock
from vespera_exec.model.enums import (
    EventType as EventType,
    ExecutionPhase as ExecutionPhase,
    ExecutionStatus as ExecutionStatus,
    MessageLevel as MessageLevel,
    ProgressType as ProgressType,
    RecoveryAction as RecoveryAction,
    ResourceType as ResourceType,
    StepStatus as StepStatus,
    TaskStatus as TaskStatus,
)
from vespera_exec.model.events import ExecutionEvent as ExecutionEvent
from vespera_exec.model.execution import EnhancedTaskExecution as EnhancedTaskExecution, TaskExecution as TaskExecution
from vespera_exec.model.lifecycle import Lifecycle as Lifecycle
from vespera_exec.model.phases import PhaseManager as PhaseManager
from vespera_exec.model.plans.plan import (
    ExecutionPlan as ExecutionPlan,
    Fallback as Fallback,
    PlanStep as PlanStep,
    StepRetries as StepRetries,
)
from vespera_exec.model.principal import Caller as Caller
from vespera_exec.model.profile import PerformanceProfiler as PerformanceProfiler
from vespera_exec.model.progress import (
    Progress as Progress,
    ProgressReport as ProgressReport,
    ProgressState as ProgressState,
)
from vespera_exec.model.plans.restoring import (
    ExecutionCheckpoint as ExecutionCheckpoint,
    ExecutionState as ExecutionState,
)
from vespera_exec.model.session import ExecutionSession as ExecutionSession
from vespera_exec.model.stays import PhaseRecord as PhaseRecord
from vespera_exec.model.stream import StatusEventStream as StatusEventStream
from vespera_exec.model.task import Task as Task
from vespera_exec.model.timing import TimeTracking as TimeTracking
from vespera_exec.monitoring.eta import NaiveEstimator as NaiveEstimator
from vespera_exec.monitoring.own_process import (
    IOTracker as IOTracker,
    MemoryTracker as MemoryTracker,
    ResourceMonitor as ResourceMonitor,
)
from vespera_exec.monitoring.sampler import UsageSampler as UsageSampler
from vespera_exec.settings import Settings as Settings

__version__: str
__all__: list[str]
