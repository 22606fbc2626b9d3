-- Marks the file as ours. Executions that ended long ago may now be removed, each with its whole log; `removed_to`
-- in `meta` is the highest cursor that has been removed, so a reader from before it knows that it sees only a part.
PRAGMA application_id = 0x56455350;

-- Streams that nobody can find any more, while their events, samples and outputs go away bit by bit.
CREATE TABLE removals (
    stream INTEGER PRIMARY KEY
) STRICT;

CREATE INDEX idempotency_of_task ON idempotency (task_id);
CREATE INDEX executions_ended ON executions (completed) WHERE ended = 1;

-- Who has owned the directory, one after another.
CREATE TABLE owners (
    generation INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL UNIQUE,     -- as in `executions.owner`
    pid INTEGER NOT NULL,
    start_ticks INTEGER,
    boot_id TEXT,
    purpose TEXT NOT NULL,
    version TEXT NOT NULL,
    since TEXT NOT NULL,
    until TEXT,                     -- its end, or when the next owner found it gone
    ended TEXT CHECK (ended IN ('clean', 'dead'))
) STRICT;

-- SHA-256 of the request that a key was used for; NULL where it was not kept.
ALTER TABLE idempotency ADD COLUMN digest BLOB;
