"""The record cache: each completion, as it came, under the hash of the request that was sent."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from filelock import FileLock

from fabe_ds.errors import CacheError, reason
from fabe_ds.files import is_locked
from fabe_ds.request import Completion
from fabe_ds.store.layout import Layout, private_folder

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS completions (
    key BLOB NOT NULL UNIQUE, text TEXT NOT NULL, finish_reason TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, created REAL NOT NULL, reasoning TEXT,
    logprobs TEXT);
CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (run TEXT PRIMARY KEY, endpoint TEXT NOT NULL, batch TEXT);
CREATE TABLE IF NOT EXISTS batch_keys (run TEXT, line INTEGER, key BLOB, PRIMARY KEY (run, line))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS written (mark BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS limits (base BLOB, key BLOB, max_tokens INTEGER);
CREATE TABLE IF NOT EXISTS token_limits (max_tokens INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS learned (
    endpoint TEXT, model TEXT, name TEXT, value TEXT, PRIMARY KEY (endpoint, model, name)
    ) WITHOUT ROWID;
"""
_FORMER_COLUMNS = "key, text, finish_reason, prompt_tokens, completion_tokens"
_LATER_COLUMNS = ("reasoning", "logprobs")
"""Those that caches of earlier versions lack."""
_COLUMNS = ", ".join((_FORMER_COLUMNS, *_LATER_COLUMNS))
_STORE = f"INTO completions ({_COLUMNS}, created) VALUES (?,?,?,?,?,?,?,?)"
_KEPT = 6  # fields of a completion that are stored
_IN = 500  # host parameters a statement; old builds of SQLite allow 999
_BUSY_SECONDS = 30

T = TypeVar("T")


class Row(NamedTuple):
    """A completion to store. `base` is its key without the token limit, where other limits may be
    answered by it; `max_tokens` is that limit."""

    key: bytes
    completion: Completion
    base: bytes | None = None
    max_tokens: int = 0


class Completions(Protocol):
    """What the engines ask of a record cache, wherever it is. `RecordCache` says what each does."""

    def get(self, keys: Sequence[bytes], since: float = 0.0) -> dict[bytes, Completion]: ...
    def put(self, rows: Iterable[Row]) -> None: ...
    def other_limits(self, max_tokens: int) -> bool: ...
    def under_other_limits(
        self, bases: Sequence[bytes]
    ) -> dict[bytes, list[tuple[int, Completion]]]: ...
    def learned(self, endpoint: str, model: str) -> dict[str, str]: ...
    def learn(self, endpoint: str, model: str, name: str, value: str) -> None: ...
    def claim(self, keys: Sequence[bytes]) -> set[bytes]: ...
    def release(self, keys: Sequence[bytes]) -> None: ...
    def close(self) -> None: ...


class OpenBatch(NamedTuple):
    """A batch that was sent (or was about to be) and has not been read to its end."""

    run: str
    endpoint: str
    batch: str | None


class RecordCache:
    """Completions on disk, shared by any number of processes on this machine.

    SQLite in WAL mode on a local file system; a commit is on disk before `put` returns. Usable
    from several threads. A damaged file is set aside, and what can be read of it is kept.

    Raises: CacheError wherever the disk does not do its part.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        """Completions up to the place `after`, as `newest` gives it, are not seen."""
        self.folder = private_folder(folder)
        self._after = after
        self._layout = Layout(folder)
        self.path = self._layout.completions
        self._lock = threading.RLock()
        self._token_limits: set[int] = set()  # that the table has
        self._owner: str | None = None
        self._owner_lock: FileLock | None = None
        self._connection = self._open()

    @classmethod
    def existing(cls, folder: Path) -> RecordCache | None:
        """The cache where there is one already; none is made."""
        try:
            Layout(folder).completions.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CacheError(f"--cache-dir {folder}: {reason(error)}") from None
        return cls(folder)

    def _open(self) -> sqlite3.Connection:
        try:
            # Two that make it at once: for a change to WAL, SQLite does not wait.
            with FileLock(self._layout.opening_lock, mode=0o600):
                return self._connect()
        except OSError as error:
            raise CacheError(f"{error.filename or self.path}: {reason(error)}") from None
        except sqlite3.OperationalError as error:
            raise CacheError(f"{self.path}: {error}{_hint(error)}") from None
        except sqlite3.DatabaseError as error:
            self._set_aside(error)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        os.close(handle)
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # a commit holds over a power cut
            connection.executescript(_SCHEMA)
            columns = [row[1] for row in connection.execute("PRAGMA table_info(completions)")]
            for name in _LATER_COLUMNS:
                if name not in columns:  # a cache that an earlier version made
                    connection.execute(f"ALTER TABLE completions ADD COLUMN {name} TEXT")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        self._token_limits.clear()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        log.warning("the record cache was damaged (%s); set aside as %s", error, aside)
        rows = list(_readable(aside))
        if rows:
            fresh = self._connect()
            fresh.executemany(f"INSERT OR IGNORE {_STORE}", [(*row, time.time()) for row in rows])
            fresh.close()
            log.warning("%d completions of it could be kept", len(rows))

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock:
            try:
                return work(self._connection)
            except sqlite3.OperationalError as error:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise CacheError(f"{self.path}: {error}{_hint(error)}") from None
            except sqlite3.DatabaseError as error:
                self._connection.close()
                self._set_aside(error)
                self._connection = self._connect()
                return work(self._connection)
            except BaseException:  # Ctrl-C in the middle of it: the next call finds all as it was
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    self._connection.execute("PRAGMA synchronous = FULL")
                raise

    def get(self, keys: Sequence[bytes], since: float = 0.0) -> dict[bytes, Completion]:
        """The completions that are there, and were stored since a time (seconds since 1970)."""

        def read(connection: sqlite3.Connection) -> dict[bytes, Completion]:
            found = {}
            for start in range(0, len(keys), _IN):
                part = keys[start : start + _IN]
                marks = ",".join("?" * len(part))
                query = f"SELECT {_COLUMNS} FROM completions WHERE key IN ({marks}) AND rowid > ?"
                values: list[object] = [*part, self._after]
                if since:
                    query, values = f"{query} AND created > ?", [*values, since]
                for key, *fields in connection.execute(query, values):
                    found[key] = Completion(*fields)
            return found

        return self._do(read) if keys else {}

    def put(self, rows: Iterable[Row]) -> None:
        """Stores completions in one transaction, and gives up the claims on them."""
        now = time.time()
        rows = list(rows)
        values = [(key, *completion[:_KEPT], now) for key, completion, _, _ in rows]
        limits = [(row.base, row.key, row.max_tokens) for row in rows if row.base is not None]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(f"INSERT OR REPLACE {_STORE}", values)
            connection.executemany("INSERT INTO limits VALUES (?, ?, ?)", limits)
            new = {limit for _, _, limit in limits} - self._token_limits
            for limit in new:
                connection.execute("INSERT OR IGNORE INTO token_limits VALUES (?)", (limit,))
            connection.executemany("DELETE FROM claims WHERE key = ?", [row[:1] for row in values])
            connection.execute("COMMIT")
            self._token_limits |= new

        self._do(write)

    def other_limits(self, max_tokens: int) -> bool:
        """Whether anything was asked for with another limit on its tokens."""
        query = "SELECT 1 FROM token_limits WHERE max_tokens <> ?"
        return bool(self.query(query, (max_tokens,)))

    def under_other_limits(
        self, bases: Sequence[bytes]
    ) -> dict[bytes, list[tuple[int, Completion]]]:
        """Completions of requests that are the same but for the limit on tokens: by their key
        without it, each after its limit."""
        names = ", ".join(f"completions.{name}" for name in _COLUMNS.split(", ")[1:])

        def read(connection: sqlite3.Connection) -> dict[bytes, list[tuple[int, Completion]]]:
            # Made when it is first needed: kept up to date, it would slow every store down.
            connection.execute("CREATE INDEX IF NOT EXISTS limits_by_base ON limits (base)")
            found: dict[bytes, list[tuple[int, Completion]]] = {}
            for start in range(0, len(bases), _IN):
                part = bases[start : start + _IN]
                query = (
                    f"SELECT base, max_tokens, {names} FROM limits JOIN completions USING (key) "
                    f"WHERE base IN ({','.join('?' * len(part))}) AND completions.rowid > ?"
                )
                for base, limit, *fields in connection.execute(query, [*part, self._after]):
                    found.setdefault(base, []).append((limit, Completion(*fields)))
            return found

        return self._do(read) if bases else {}

    def learned(self, endpoint: str, model: str) -> dict[str, str]:
        """What was learned of how an endpoint wants to be asked for a model: names and values."""
        query = "SELECT name, value FROM learned WHERE endpoint = ? AND model = ?"
        return dict(self.query(query, (endpoint, model)))

    def learn(self, endpoint: str, model: str, name: str, value: str) -> None:
        self.query(
            "INSERT OR REPLACE INTO learned VALUES (?,?,?,?)", (endpoint, model, name, value)
        )

    def claim(self, keys: Sequence[bytes]) -> set[bytes]:
        """Claims keys for this process; gives those that another living one holds.

        A claim says that its request is being sent. It ends with `put`, `release` or its owner.
        """
        owner = self._own()

        def write(connection: sqlite3.Connection) -> dict[bytes, str]:
            connection.execute("PRAGMA synchronous = NORMAL")  # a claim need not outlive the power
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "INSERT OR IGNORE INTO claims VALUES (?, ?)", [(key, owner) for key in keys]
            )
            held: dict[bytes, str] = {}
            for start in range(0, len(keys), _IN):
                part = keys[start : start + _IN]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, owner FROM claims WHERE key IN ({marks})"
                held.update(connection.execute(query, part).fetchall())
            connection.execute("COMMIT")
            connection.execute("PRAGMA synchronous = FULL")
            return {key: holder for key, holder in held.items() if holder != owner}

        held = self._do(write)
        dead = {holder for holder in set(held.values()) if not self._alive(holder)}
        if not dead:
            return set(held)
        for holder in dead:
            self._forget(holder)
        return self.claim(list(held))

    def _forget(self, owner: str) -> None:
        self._do(lambda c: c.execute("DELETE FROM claims WHERE owner = ?", (owner,)))

    def release(self, keys: Sequence[bytes]) -> None:
        """Gives up claims whose requests failed."""
        rows = [(key, self._owner) for key in keys]
        self._do(lambda c: c.executemany("DELETE FROM claims WHERE key = ? AND owner = ?", rows))

    def remember_batch(self, batch: OpenBatch, keys: Sequence[bytes] = ()) -> None:
        """Notes a batch, and the keys of its requests in the order of its lines."""
        rows = [(batch.run, line, key) for line, key in enumerate(keys)]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?)", batch)
            connection.executemany("INSERT OR REPLACE INTO batch_keys VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")

        self._do(write)

    def open_batches(self, endpoint: str | None = None) -> list[OpenBatch]:
        """Those at an endpoint, or at all."""
        query = "SELECT run, endpoint, batch FROM batches WHERE endpoint = IFNULL(?, endpoint)"
        return [OpenBatch(*row) for row in self.query(query, [endpoint])]

    def batch_keys(self, run: str) -> list[str]:
        """The keys of a batch's requests, in hexadecimal, in the order of its lines."""
        rows = self.query("SELECT key FROM batch_keys WHERE run = ? ORDER BY line", [run])
        return [key.hex() for (key,) in rows]

    def forget_batch(self, run: str) -> None:
        self.query("DELETE FROM batches WHERE run = ?", [run])
        self.query("DELETE FROM batch_keys WHERE run = ?", [run])

    def mark_written(self, marks: Iterable[bytes]) -> None:
        """Remembers values that were written into files in place."""
        rows = [(mark,) for mark in marks]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR IGNORE INTO written VALUES (?)", rows)
            connection.execute("COMMIT")

        self._do(write)

    def was_written(self, mark: bytes) -> bool:
        query = "SELECT 1 FROM written WHERE mark = ?"
        return self._do(lambda c: c.execute(query, (mark,)).fetchone()) is not None

    def newest(self) -> int:
        """The place of the completion that was stored last."""
        return int(self.query("SELECT IFNULL(MAX(rowid), 0) FROM completions")[0][0])

    def hide_all(self) -> None:
        """From now on, only what is stored from now on is seen."""
        self._after = self.newest()

    def count(self) -> int:
        return int(self.query("SELECT COUNT(*) FROM completions")[0][0])

    def query(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        """The rows of a statement of one's own."""
        return self._do(lambda connection: connection.execute(sql, values).fetchall())

    def close(self) -> None:
        with self._lock:
            if self._owner is not None:
                with contextlib.suppress(CacheError):
                    self._forget(self._owner)
            self._connection.close()
            if self._owner_lock is not None:
                self._owner_lock.release()
                Path(self._owner_lock.lock_file).unlink(missing_ok=True)
                self._owner, self._owner_lock = None, None

    # An owner is alive while its lock is held.

    def _own(self) -> str:
        if self._owner is None:
            owner = uuid.uuid4().hex
            try:
                self._owner_lock = FileLock(self._lock_path(owner), mode=0o600, thread_local=False)
                self._owner_lock.acquire(timeout=0)
            except OSError as error:
                where = error.filename or self.folder
                raise CacheError(f"{where}: cannot be written: {reason(error)}") from None
            self._owner = owner
        return self._owner

    def _alive(self, owner: str) -> bool:
        path = self._lock_path(owner)
        if not path.exists():
            return False
        if is_locked(path):
            return True
        path.unlink(missing_ok=True)
        return False

    def _lock_path(self, owner: str) -> Path:
        self._layout.owners.mkdir(mode=0o700, exist_ok=True)
        return self._layout.owners / f"{owner}.lock"


def _hint(error: sqlite3.OperationalError) -> str:
    """What a person may do about it."""
    if "full" in str(error):
        return "; make room, then run the same command again: what was answered is kept"
    return "; is it on a local disk, with room?" if "lock" not in str(error) else ""


def _readable(path: Path) -> Iterator[tuple[object, ...]]:
    """The rows of a damaged file, up to where it cannot be read."""
    with (
        contextlib.closing(sqlite3.connect(path)) as connection,
        contextlib.suppress(sqlite3.Error),
    ):
        there = [row[1] for row in connection.execute("PRAGMA table_info(completions)")]
        later = (name if name in there else "NULL" for name in _LATER_COLUMNS)
        columns = ", ".join((_FORMER_COLUMNS, *later))
        yield from connection.execute(f"SELECT {columns} FROM completions")
