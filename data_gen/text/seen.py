"""A set of texts whose memory does not grow: hashes in a database on disk, gone with the process."""

import hashlib
import os
import sqlite3

from data_gen.core.errors import InputError

FOLDERS = ("/var/tmp", "/usr/tmp", "/tmp")
"""Where SQLite keeps temporary files when no variable names a folder; the first that can be written to."""


class Seen:
    """64 bits of SHA-256 for each text: among ten million texts, two share them with a probability of 3e-6.

    Raises InputError, naming the folder of temporary files, when that has no room.
    """

    def __init__(self) -> None:
        self._keys = sqlite3.connect("")  # a temporary file that SQLite removes itself
        self._ask("CREATE TABLE seen (key INTEGER PRIMARY KEY)")

    def add(self, text: str) -> bool:
        """Remember a text; whether it is new."""
        return self._ask("INSERT OR IGNORE INTO seen VALUES (?)", _key(text)).rowcount == 1

    def __contains__(self, text: str) -> bool:
        return self._ask("SELECT 1 FROM seen WHERE key = ?", _key(text)).fetchone() is not None

    def _ask(self, statement: str, *values: int) -> sqlite3.Cursor:
        try:
            return self._keys.execute(statement, values)
        except sqlite3.Error as error:
            named = [os.environ.get(name, "") for name in ("SQLITE_TMPDIR", "TMPDIR")]
            folder = next((each for each in (*named, *FOLDERS) if os.access(each, os.W_OK | os.X_OK)), ".")
            raise InputError(
                f"{folder}: the hashes of all texts do not fit in this folder of temporary files ({error}); make room "
                "there, or set SQLITE_TMPDIR to another folder"
            ) from error


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
