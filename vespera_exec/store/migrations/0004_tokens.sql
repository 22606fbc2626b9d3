-- Named tokens. A row stays when its token is revoked, since a name is used once: its tasks belong to that name.
CREATE TABLE tokens (
    id TEXT PRIMARY KEY,            -- the part of the token that is no secret
    name TEXT NOT NULL,
    digest BLOB NOT NULL,           -- SHA-256 of the whole token; empty where it came out of a backup
    scopes TEXT NOT NULL,           -- separated by spaces
    directory TEXT NOT NULL,        -- the data directory that it was made for; it is worth nothing in another
    created INTEGER NOT NULL,
    created_by TEXT NOT NULL,
    expires INTEGER,
    last_used INTEGER,
    revoked INTEGER
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX one_token_per_name ON tokens (name) WHERE revoked IS NULL;
