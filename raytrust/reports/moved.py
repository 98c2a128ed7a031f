"""A results directory that was moved or copied, and the MLflow database in it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from raytrust.reports.tracking_uri import DATABASE, artifact_location, default_uri

PLACES = {  # where MLflow writes down, as absolute addresses, where an experiment and each of its runs keep files
    "experiments": "UPDATE experiments SET artifact_location = :here || substr(artifact_location, length(:there) + 1) "
    "WHERE artifact_location = :there OR instr(artifact_location, :there || '/') = 1",
    "runs": "UPDATE runs SET artifact_uri = :here || substr(artifact_uri, length(:there) + 1) "
    "WHERE instr(artifact_uri, :there || '/') = 1",
}


def bring_along(root: Path) -> None:
    """Let the database in `root` keep files there, also if it was made elsewhere and came along with its directory.

    MLflow would go on to write into the old place, where what is private may be read by others. Raises sqlite3.Error
    if the database can't be read or changed.
    """
    database, here = root / DATABASE, artifact_location(default_uri(root))
    if not database.exists():
        return
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not set(PLACES) <= tables:
            return
        beside = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file:%/mlartifacts'"
        for (there,) in connection.execute(beside).fetchall():
            if there != here:
                for update in PLACES.values():
                    connection.execute(update, {"here": here, "there": there})
