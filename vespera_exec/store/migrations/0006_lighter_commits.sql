-- An execution's log stands in segments, each under an integer of its own, the first under that of the stream. So what
-- is written at one time stands together in the index of (segment, sequence), and a commit changes few of its pages.
-- How long a segment is only its writer knows.
CREATE TABLE segments (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    since INTEGER NOT NULL CHECK (since > 0),   -- the sequence of its first event
    UNIQUE (stream, since)
) STRICT;

INSERT INTO segments SELECT id, id, 1 FROM streams;

-- The executions whose log says that they ended: once, in whichever of its segments.
CREATE TABLE ends (
    stream INTEGER PRIMARY KEY
) STRICT;

INSERT INTO ends SELECT id FROM executions WHERE ended = 1;
DROP INDEX one_end_per_execution;

ALTER TABLE events RENAME COLUMN stream TO segment;

-- Each event with the stream that it belongs to. `ORDER BY since, sequence` follows the indexes.
CREATE VIEW log AS
SELECT e.cursor, g.stream, g.since, e.sequence, e.type, e.at, e.ends, e.checksum, e.body
FROM segments g JOIN events e ON e.segment = g.id;

-- How far an execution is. The whole of it (`Progress`) is written now and then and where the execution ends; whoever
-- wants it whole folds the events after `sequence` into it.
ALTER TABLE progress RENAME TO progress_before;

CREATE TABLE progress (
    id INTEGER PRIMARY KEY,
    percentage REAL
) STRICT;

CREATE TABLE progress_docs (
    id INTEGER PRIMARY KEY,
    sequence INTEGER NOT NULL,      -- as in `doc`
    doc TEXT NOT NULL
) STRICT;

INSERT INTO progress SELECT id, percentage FROM progress_before;
INSERT INTO progress_docs
SELECT id, CASE WHEN json_valid(doc) THEN CAST(coalesce(json_extract(doc, '$.sequence'), 0) AS INTEGER) ELSE 0 END, doc
FROM progress_before;
DROP TABLE progress_before;
