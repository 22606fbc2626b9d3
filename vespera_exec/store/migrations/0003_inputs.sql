-- The questions of roles that wait for an answer now, over all tasks. What was asked before is in `executions.doc`.
CREATE TABLE input_requests (
    execution INTEGER NOT NULL,
    key TEXT NOT NULL,
    task INTEGER NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL,
    schema TEXT NOT NULL,           -- JSON Schema of an answer's content
    asked INTEGER NOT NULL,
    PRIMARY KEY (execution, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX input_requests_by_age ON input_requests (asked);
