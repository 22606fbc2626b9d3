-- A step of a plan is done by a task of its own, which knows the execution of the plan and its step there.
ALTER TABLE tasks ADD COLUMN parent INTEGER;    -- the stream of the plan's execution; NULL for a task of its own
ALTER TABLE tasks ADD COLUMN step TEXT;

CREATE INDEX tasks_of_plan ON tasks (parent, step) WHERE parent IS NOT NULL;

-- The tasks of plans' steps stand in no list, however many they are.
DROP INDEX tasks_by_change;
CREATE INDEX tasks_by_change ON tasks (updated) WHERE parent IS NULL;
CREATE INDEX tasks_given_up ON tasks (updated)
WHERE status IN ('todo', 'failed') AND shown IS NOT NULL AND parent IS NULL;

-- What the events of a plan's execution fold to, beside its rows in `executions` and `progress`.
CREATE TABLE plan_states (
    id INTEGER PRIMARY KEY,         -- the stream of the plan's execution
    doc TEXT NOT NULL
) STRICT;

CREATE TABLE steps (
    execution INTEGER NOT NULL,
    position INTEGER NOT NULL CHECK (position >= 0),
    step TEXT NOT NULL,
    status TEXT NOT NULL,
    doc TEXT NOT NULL,
    PRIMARY KEY (execution, position),
    UNIQUE (execution, step)
) STRICT, WITHOUT ROWID;

CREATE INDEX steps_by_status ON steps (execution, status);

-- Places in an execution's log that it can go back to: the state is the fold of the events up to `sequence`.
CREATE TABLE checkpoints (
    id TEXT PRIMARY KEY,
    execution INTEGER NOT NULL,
    sequence INTEGER NOT NULL CHECK (sequence > 0),
    kind TEXT NOT NULL,
    created INTEGER NOT NULL,
    metadata TEXT NOT NULL          -- JSON
) STRICT, WITHOUT ROWID;

CREATE INDEX checkpoints_of_execution ON checkpoints (execution, sequence);

-- Which execution has answered what a pure role was asked. Its result is the answer, as long as that is kept.
CREATE TABLE step_cache (
    key BLOB NOT NULL,              -- SHA-256 of role and inputs
    principal TEXT NOT NULL,
    role TEXT NOT NULL,
    execution INTEGER NOT NULL,
    PRIMARY KEY (key, principal)
) STRICT, WITHOUT ROWID;

CREATE INDEX step_cache_of_execution ON step_cache (execution);
