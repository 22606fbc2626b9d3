-- Times are microseconds since 1970 UTC, durations microseconds. Names that come from outside (task and
-- execution ids) stand once, in `streams`; everything else refers to them by integer.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE streams (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,      -- a task id or an execution id
    task INTEGER NOT NULL           -- the stream of the task it belongs to; its own id for a task
) STRICT;

CREATE INDEX streams_of_task ON streams (task);

-- The truth. Rows are only ever added, in the order of `cursor`; nothing updates or deletes them.
CREATE TABLE events (
    cursor INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    sequence INTEGER NOT NULL CHECK (sequence > 0),
    type TEXT NOT NULL,
    at INTEGER NOT NULL,
    ends INTEGER NOT NULL CHECK (ends IN (0, 1)),  -- the status change that ended an execution
    checksum INTEGER NOT NULL,                     -- CRC-32 of body
    body BLOB NOT NULL,                            -- the event's JSON, without its cursor
    UNIQUE (stream, sequence)
) STRICT;

CREATE UNIQUE INDEX one_end_per_execution ON events (stream) WHERE ends = 1;

-- What the events fold to, written in their transaction. `doc` is the whole state, as JSON.
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    role TEXT,
    status TEXT NOT NULL,
    priority INTEGER NOT NULL,
    principal TEXT NOT NULL,
    created INTEGER NOT NULL,       -- 0 where it is not known
    updated INTEGER NOT NULL,
    shown INTEGER,                  -- its running execution, else the last one
    doc TEXT NOT NULL
) STRICT;

CREATE INDEX tasks_by_change ON tasks (updated);

CREATE TABLE executions (
    id INTEGER PRIMARY KEY,
    task INTEGER NOT NULL,
    run TEXT NOT NULL,
    attempt INTEGER NOT NULL CHECK (attempt > 0),
    role TEXT,
    status TEXT NOT NULL,
    ended INTEGER NOT NULL CHECK (ended IN (0, 1)),
    priority INTEGER NOT NULL,
    owner TEXT,
    generation INTEGER NOT NULL CHECK (generation >= 0),
    created INTEGER,
    started INTEGER,
    completed INTEGER,
    active_us INTEGER NOT NULL,
    queue_us INTEGER NOT NULL,
    error_code TEXT,
    doc TEXT NOT NULL
) STRICT;

CREATE INDEX executions_of_task ON executions (task);
CREATE INDEX executions_of_run ON executions (run);
CREATE INDEX executions_unfinished ON executions (id) WHERE ended = 0;
CREATE INDEX executions_completed ON executions (role, completed) WHERE status = 'completed';

CREATE TRIGGER an_end_is_final BEFORE UPDATE ON executions
WHEN old.ended = 1 AND new.status <> old.status
BEGIN
    SELECT raise(ABORT, 'fenced: the execution has ended');
END;

CREATE TRIGGER a_dead_owner_writes_no_more BEFORE UPDATE ON executions
WHEN new.generation < old.generation
BEGIN
    SELECT raise(ABORT, 'fenced: another owner has taken the execution over');
END;

CREATE TABLE progress (
    id INTEGER PRIMARY KEY,
    percentage REAL,
    message TEXT NOT NULL,
    doc TEXT NOT NULL
) STRICT;

CREATE TABLE results (
    id INTEGER PRIMARY KEY,
    truncated INTEGER NOT NULL CHECK (truncated IN (0, 1)),
    size INTEGER NOT NULL,
    body BLOB NOT NULL
) STRICT;

-- Who asked for a run; nobody but the owner reads it.
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,         -- the stream of the run's first execution
    body BLOB NOT NULL
) STRICT;

CREATE TABLE idempotency (
    principal TEXT NOT NULL,
    operation TEXT NOT NULL,
    key TEXT NOT NULL,
    task_id TEXT NOT NULL,
    run_id TEXT,
    PRIMARY KEY (principal, operation, key)
) STRICT, WITHOUT ROWID;

-- Measurements, not facts: they may be dropped.
CREATE TABLE samples (
    execution INTEGER NOT NULL,
    at INTEGER NOT NULL,
    metric TEXT NOT NULL,
    value REAL NOT NULL
) STRICT;

CREATE INDEX samples_of_execution ON samples (execution, at);
