-- The journal's tables, version 6. What was released is never edited: changes are migrations, in
-- schema.py, which also splits this file at each semicolon that ends a line.
--
-- Instants are seconds since the epoch by the wall clock, unless a comment says otherwise.

-- One request each. `request` and `reply` are JSON, see codec.py.
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- later entries have larger numbers
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    owner INTEGER,  -- `owners.id`
    notebook TEXT,
    cell TEXT,  -- the id of the cell that sent the prompt
    variable TEXT,  -- the variable that the reply is assigned to
    key BLOB,  -- the `equality_key` of codec.py, salted
    added_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    resume_at REAL,  -- when it may be sent, if it is waiting or parked
    limits TEXT,  -- not used
    error TEXT,
    response_id TEXT,  -- the durable response that carries the answer
    sequence INTEGER,  -- the last event of that response whose text is in `text`
    request TEXT NOT NULL,
    reply TEXT,
    text TEXT NOT NULL DEFAULT '',
    batch TEXT,  -- the map run that it is a row of
    item INTEGER,  -- its index in that map
    listed INTEGER NOT NULL DEFAULT 1,  -- 1, or 0 for a row that another one represents in lists
    thread TEXT,
    chapter INTEGER NOT NULL DEFAULT 0,  -- how often its thread was started afresh before it
    place INTEGER,  -- its turn's number in the chapter
    begins INTEGER NOT NULL DEFAULT 0,  -- whether a new conversation starts with it
    part TEXT  -- the tag of its batch job, see `parts`
);

-- Partial indexes, because the open entries are few among very many.
CREATE INDEX entries_open ON entries (status, seq)
    WHERE status IN ('pending', 'running', 'waiting', 'parked');
CREATE INDEX entries_answered ON entries (key) WHERE status = 'done' AND key IS NOT NULL;
CREATE INDEX entries_age ON entries (added_at);
CREATE INDEX entries_notebook ON entries (notebook);
CREATE INDEX entries_listed ON entries (seq) WHERE listed = 1;
CREATE INDEX entries_batch ON entries (batch, status, owner, item) WHERE batch IS NOT NULL;
CREATE INDEX entries_thread
    ON entries (thread, notebook, seq, chapter, place, cell, status, begins)
    WHERE thread IS NOT NULL;
CREATE INDEX entries_part ON entries (part) WHERE part IS NOT NULL;
-- Rows that a provider has, to find equal ones.
CREATE INDEX entries_away ON entries (key)
    WHERE part IS NOT NULL AND status IN ('waiting', 'parked');

-- The processes that own entries, see `Owner` in owner.py.
CREATE TABLE owners (
    id INTEGER PRIMARY KEY,
    host TEXT NOT NULL,  -- the machine's host name
    boot TEXT NOT NULL,  -- the id of its boot
    space TEXT NOT NULL,  -- the pid namespace
    pid INTEGER NOT NULL,
    start INTEGER NOT NULL,  -- when the process started, in ticks since boot
    beat_at REAL NOT NULL,  -- the last heartbeat
    beat_now REAL NOT NULL  -- the same instant in seconds since boot
);

-- The entries with their owners.
CREATE VIEW book AS
    SELECT e.*, o.host, o.boot, o.space, o.pid, o.start, o.beat_at, o.beat_now
    FROM entries AS e LEFT JOIN owners AS o ON o.id = e.owner;

-- Each time that a thread was started afresh.
CREATE TABLE chapters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    notebook TEXT,
    thread TEXT NOT NULL,
    begun_at REAL NOT NULL
);

-- The batch jobs.
CREATE TABLE parts (
    tag TEXT PRIMARY KEY,  -- our name for the job
    base_url TEXT NOT NULL,
    file TEXT,  -- the provider's id of the input file
    remote TEXT  -- the provider's id of the job
);

-- The fields of `models.UsageTotals`, kept as sums, so that they outlive deleted entries.
CREATE TABLE totals (
    requests INTEGER NOT NULL DEFAULT 0,
    answers INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    cost REAL NOT NULL DEFAULT 0,
    waited REAL NOT NULL DEFAULT 0,
    unknown INTEGER NOT NULL DEFAULT 0,
    unpriced INTEGER NOT NULL DEFAULT 0,
    estimated INTEGER NOT NULL DEFAULT 0
);
INSERT INTO totals DEFAULT VALUES;

-- What was spent on each day, an ISO date.
CREATE TABLE spending (day TEXT PRIMARY KEY, tokens INTEGER NOT NULL, dollars REAL NOT NULL);

-- The budget of all kernels, as its user wrote it.
CREATE TABLE budget (text TEXT NOT NULL);

-- What is reserved of the budget: the most that each running request may use.
CREATE TABLE asides (
    id TEXT PRIMARY KEY,
    owner INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    dollars REAL NOT NULL
);

-- Hashed together with each `entries.key`, so that keys are useless outside of this file.
CREATE TABLE salt (value BLOB NOT NULL);
INSERT INTO salt VALUES (randomblob(32));

-- The application id is "nbcx" in ASCII.
PRAGMA application_id = 1851941752;
PRAGMA user_version = 6;
