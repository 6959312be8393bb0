"""The tables of the store, and the steps from each version of them to the next.

`objects` hold responses, conversations, files and batches; `parts` their items, pieces and lines, in order.
"""

import sqlite3

from quire.errors import ConfigurationError

APPLICATION_ID = 0x51756972
"""`Quir`, in the header of the file."""
MIGRATIONS = (
    """
    CREATE TABLE objects (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        owner TEXT NOT NULL,
        created_s INTEGER NOT NULL,
        is_open INTEGER NOT NULL,
        body BLOB NOT NULL
    );
    CREATE INDEX objects_of_owner ON objects (kind, owner, number);
    CREATE TABLE parts (
        place TEXT NOT NULL,
        number INTEGER NOT NULL,
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        content BLOB NOT NULL,
        PRIMARY KEY (place, number)
    );
    CREATE INDEX parts_by_name ON parts (owner, name) WHERE name != '';
    CREATE TABLE held (owner TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TRIGGER part_added AFTER INSERT ON parts BEGIN
        INSERT INTO held VALUES (new.owner, length(new.content))
            ON CONFLICT (owner) DO UPDATE SET num_bytes = num_bytes + length(new.content);
    END;
    CREATE TRIGGER part_removed AFTER DELETE ON parts BEGIN
        UPDATE held SET num_bytes = num_bytes - length(old.content) WHERE owner = old.owner;
    END;
    CREATE TRIGGER object_removed AFTER DELETE ON objects BEGIN
        DELETE FROM parts WHERE place = old.id OR (place > old.id || '/' AND place < old.id || '0');
    END;
    """,
)


def prepare(connection: sqlite3.Connection) -> None:
    """Bring a database to the newest version.

    Raises:
        ConfigurationError: it was made by a newer Quire, or by something else.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if version > len(MIGRATIONS) or (version and application != APPLICATION_ID):
        text = f"the store in --state-dir has version {version}, and this is Quire of version {len(MIGRATIONS)}"
        raise ConfigurationError(text, field="state_dir")
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        head = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number};"
        connection.executescript(f"BEGIN; {statements} {head} COMMIT;")
