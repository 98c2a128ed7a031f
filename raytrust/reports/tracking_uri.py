"""Addresses of MLflow stores: of a directory's own database, absolute, without passwords, and as one shows them.

MLflow hands a database's address to SQLAlchemy, of which some releases decode percent signs in a path and others do
not, and none takes a question mark for part of it. So paths with either are refused, and all others mean themselves.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

DATABASE = "mlflow.db"
# Characters that a database's address can't hold in every release of SQLAlchemy.
UNFIT = "?%"
# Stores that MLflow knows by a name alone.
NAMES = ("databricks", "databricks-uc", "uc")
SECRET = re.compile(r"[^=&?]*(?:pass|pwd|secret|token|odbc_connect)[^=&]*=[^&#]*", re.IGNORECASE)


def default_uri(root: Path) -> str:
    """The address of a database of its own in a run's directory. Raises ValueError if its path can't be one."""
    return f"sqlite:///{_fit(root.resolve() / DATABASE)}"


def artifact_location(uri: str) -> str | None:
    """Where a new experiment in the store at `uri`, absolute, keeps its files: beside an SQLite database. None: the
    store decides, as a server does."""
    path = database_path(uri)
    return None if path is None else (path.parent / "mlartifacts").as_uri()


def database_path(uri: str) -> Path | None:
    """The file of an SQLite database at an absolute address; None for every other store."""
    scheme, _, rest = uri.partition(":///")
    path = rest.partition("?")[0]
    return Path(path) if _is_sqlite(scheme) and path.startswith("/") else None


def absolute(uri: str) -> str:
    """The same store from every working directory: relative paths, of databases and of folders, become absolute.

    Raises ValueError if the path that results can't be part of an address.
    """
    if uri in NAMES or not uri:
        return uri
    scheme, colon, rest = uri.partition(":")
    if _is_sqlite(scheme):
        path, mark, options = rest.removeprefix("///").partition("?")
        if not rest.startswith("///") or path in ("", ":memory:") or path.startswith(("/", "file:")):
            return uri
        _fit(Path.cwd())
        return f"{scheme}:///{os.path.abspath(path)}{mark}{options}"
    if scheme == "file" and not rest.startswith("/"):
        return Path(os.path.abspath(rest)).as_uri()
    # A folder without a scheme: what stands before the colon, if there is one, is part of a path.
    if not colon or "/" in scheme:
        return Path(os.path.abspath(Path(uri).expanduser())).as_uri()
    return uri


def without_password(uri: str) -> str:
    """The address without what must not be shown or kept: passwords, and of a server the user's name with it."""
    match = re.match(r"([a-z][a-z0-9+.-]*)://(.*)", uri, re.IGNORECASE | re.DOTALL)
    if match is None or _is_sqlite(match[1]) or match[1] == "file":
        return uri
    scheme, rest = match.groups()
    user, rest = _user_and_rest(scheme, rest)
    place, mark, query = rest.partition("?")
    query = "&".join(part for part in query.split("&") if not SECRET.match(part))
    kept = f"{user.partition(':')[0]}@" if user and not _is_served(scheme) else ""
    return f"{scheme}://{kept}{place}{mark if query else ''}{query}"


def with_password(uri: str, environment: Mapping[str, str]) -> str:
    """The address with its password where MLFLOW_TRACKING_URI in the environment is the same store's and has it."""
    given = absolute(environment.get("MLFLOW_TRACKING_URI", ""))
    return given if given and without_password(given) == uri else uri


def scrub(text: str, uri: str = "") -> str:
    """A text to be shown, without the passwords in the addresses that it names, nor that of `uri`."""
    # An address within another text can't be told apart from it if its password holds spaces: this one is known.
    text = text.replace(uri, without_password(uri)) if uri else text
    if (password := _password(uri)) is not None:
        text = text.replace(password, "***")
    return re.sub(
        r"[a-z][a-z0-9+.-]*://[^\s'\"]+", lambda address: without_password(address[0]), text, flags=re.IGNORECASE
    )


def show_command(uri: str) -> str:
    """How to look at the runs in the store: its own address if it is a server, else a command for a shell."""
    public = without_password(uri)
    if _is_served(uri.partition(":")[0]):
        return public
    start = "mlflow ui --host 127.0.0.1 --backend-store-uri"
    if public != uri:
        return f'{start} "$MLFLOW_TRACKING_URI"  # {public} with its password'
    return f"{start} {shlex.quote(uri)}"


def check_outside(uri: str, root: Path) -> None:
    """Raises ValueError for a store of files that was given within a run's directory, which may be moved."""
    path = database_path(uri)
    if path is None and uri.startswith("file:///"):
        path = Path(uri.removeprefix("file://"))
    if path is not None and path.resolve().is_relative_to(root):
        raise ValueError(
            f"Expected tracking_uri={uri!r} to lie outside of the output directory; without --tracking-uri a run keeps "
            f"{DATABASE} there, which may be moved with it."
        )


def _fit(path: Path) -> Path:
    if unfit := sorted(set(str(path)) & set(UNFIT)):
        raise ValueError(
            f"Expected {str(path)!r}, the place of an MLflow database, to have no {' and no '.join(unfit)} in its path."
        )
    return path


def _is_sqlite(scheme: str) -> bool:
    return scheme.partition("+")[0] == "sqlite"


def _is_served(scheme: str) -> bool:
    return scheme.lower() in ("http", "https")


def _user_and_rest(scheme: str, rest: str) -> tuple[str, str]:
    """What stands before the host, and the host with all that follows. A password may hold what it should not: / @ #"""
    authority = re.match(r"[^/?#]*", rest)
    assert authority is not None
    plain = re.fullmatch(r"[^:@]*|\[[^\]]*\]|.*:\d+", authority[0]) is not None
    if "@" not in rest or (_is_served(scheme) and plain and "@" not in authority[0]):
        return "", rest
    first = rest.index("@")
    end = re.search(r"[/?#]|$", rest[first:])
    assert end is not None
    last = rest.rindex("@", 0, first + end.start())
    return rest[:last], rest[last + 1 :]


def _password(uri: str) -> str | None:
    match = re.match(r"([a-z][a-z0-9+.-]*)://(.*)", uri, re.IGNORECASE | re.DOTALL)
    if match is None or _is_sqlite(match[1]) or match[1] == "file":
        return None
    return _user_and_rest(*match.groups())[0].partition(":")[2] or None
