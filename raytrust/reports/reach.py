"""Whether a tracking store can be reached, found out at once: MLflow itself would go on trying for minutes."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit

from raytrust.reports.tracking_uri import without_password

DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433, "sqlite": None}
PORTS = DATABASES | {"http": 80, "https": 443}


def expect_server(uri: str) -> None:
    """Raises OSError if nothing listens at an address of a server or a database."""
    parts = urlsplit(without_password(uri))
    port = PORTS.get(parts.scheme.partition("+")[0])
    if port is None or parts.hostname is None:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    socket.create_connection((parts.hostname, parts.port or port), timeout=10).close()


def expect_database(uri: str) -> None:
    """Raises an error of SQLAlchemy's if a database can't be read."""
    if uri.partition(":")[0].partition("+")[0] not in DATABASES:
        return
    import sqlalchemy  # comes with MLflow

    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()
