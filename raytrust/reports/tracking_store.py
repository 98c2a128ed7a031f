"""A tracking store before MLflow touches it: whether it can be reached, and one that was moved with its directory."""

from __future__ import annotations

import socket
import sqlite3
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from raytrust.reports.tracking_uri import DATABASE, artifact_location, default_uri, without_password

DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433, "sqlite": None}
PORTS = DATABASES | {"http": 80, "https": 443}
# MLflow writes down, as absolute addresses, where an experiment and each of its runs keep files.
MOVES = {
    "experiments": "UPDATE experiments SET artifact_location = :here || substr(artifact_location, length(:there) + 1) "
    "WHERE artifact_location = :there OR instr(artifact_location, :there || '/') = 1",
    "runs": "UPDATE runs SET artifact_uri = :here || substr(artifact_uri, length(:there) + 1) "
    "WHERE instr(artifact_uri, :there || '/') = 1",
}


def expect_server(uri: str) -> None:
    """Raises OSError if nothing listens at an address of a server or a database."""
    parts = urlsplit(without_password(uri))
    port = PORTS.get(parts.scheme.partition("+")[0])
    if port is None or parts.hostname is None:
        return
    # Behind a proxy there may be a server that can't be reached from here.
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    # MLflow itself would go on trying for minutes.
    socket.create_connection((parts.hostname, parts.port or port), timeout=10).close()


def expect_database(uri: str) -> None:
    """Raises an error of SQLAlchemy's if a database can't be read."""
    if uri.partition(":")[0].partition("+")[0] not in DATABASES:
        return
    # It comes with MLflow, and takes a second to load.
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def bring_along(root: Path) -> None:
    """Let the database in `root` keep files there, also if it was made elsewhere and came along with its directory.

    Raises sqlite3.Error if the database can't be read or changed.
    """
    database, here = root / DATABASE, artifact_location(default_uri(root))
    if not database.exists():
        return
    # MLflow would go on to write into the old place, where what is private may be read by others.
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not set(MOVES) <= tables:
            return
        beside = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file:%/mlartifacts'"
        for (there,) in connection.execute(beside).fetchall():
            for move in MOVES.values() if there != here else ():
                connection.execute(move, {"here": here, "there": there})
