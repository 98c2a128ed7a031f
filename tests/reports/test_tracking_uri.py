"""Addresses of MLflow stores: what SQLAlchemy and MLflow make of them, and what is shown of them."""

from __future__ import annotations

import shlex
import sqlite3
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient
from sqlalchemy import make_url

from raytrust.reports.tracking_uri import (
    absolute,
    artifact_location,
    check_outside,
    database_path,
    default_uri,
    scrub,
    show_command,
    with_password,
    without_password,
)

ODD = ["x#8", "x&8", "my results", "Ergebnisse für Özge", "x+y", "it's", "a;b=c", "a@b:c", "$HOME", "-x", '"x"', "日本"]


@pytest.mark.parametrize("name", ODD)
def test_odd_directories_mean_themselves(tmp_path: Path, name: str) -> None:
    """To the database's driver, to the files' address, and to a shell."""
    uri = default_uri(tmp_path / name)
    assert make_url(uri).database == str(tmp_path / name / "mlflow.db")
    assert database_path(uri) == tmp_path / name / "mlflow.db"
    files = artifact_location(uri)
    assert files is not None
    assert urllib.request.url2pathname(urlsplit(files).path) == str(tmp_path / name / "mlartifacts")
    assert shlex.split(show_command(uri)) == ["mlflow", "ui", "--host", "127.0.0.1", "--backend-store-uri", uri]


def test_an_odd_directory_holds_all_that_mlflow_writes(tmp_path: Path) -> None:
    root = tmp_path / "für #1 & 'alle' $x;y+z@w:v"
    client = MlflowClient(tracking_uri=default_uri(root))
    experiment = client.create_experiment("e", artifact_location=artifact_location(default_uri(root)))
    run = client.create_run(experiment).info.run_id
    (tmp_path / "picture.png").write_bytes(b"png")
    client.log_artifact(run, str(tmp_path / "picture.png"))
    assert {path.name for path in tmp_path.iterdir()} == {root.name, "picture.png"}
    assert {path.name for path in root.iterdir()} == {"mlflow.db", "mlartifacts"}
    assert len(list((root / "mlartifacts").rglob("picture.png"))) == 1
    with sqlite3.connect(root / "mlflow.db") as database:
        assert database.execute("SELECT run_uuid FROM runs").fetchall() == [(run,)]


@pytest.mark.parametrize("name", ["x?8", "my%20results", "run?1/below"])
def test_directories_that_a_database_cannot_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\AExpected [^\n]+, the place of an MLflow database, to have no [?%] in"):
        default_uri(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///my.db", "sqlite:///HERE/my.db"),
        ("sqlite:///below/../my.db?timeout=5", "sqlite:///HERE/my.db?timeout=5"),
        ("sqlite+pysqlite:///../my.db", "sqlite+pysqlite:///ABOVE/my.db"),
        ("mlruns", "file://HERE/mlruns"),
        ("./my runs", "file://HERE/my%20runs"),
        ("file:./mlruns", "file://HERE/mlruns"),
        *((uri, uri) for uri in ("sqlite:////a/b.db", "sqlite://", "sqlite:///:memory:", "file:///a/b", "", "uc")),
        *((uri, uri) for uri in ("http://host:5000", "postgresql://u:p@host/db", "databricks", "databricks://me")),
    ],
)
def test_a_store_is_the_same_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    found = absolute(given)
    assert found == expected.replace("HERE", str(here)).replace("ABOVE", str(tmp_path))
    monkeypatch.chdir("/")
    assert absolute(found) == found


def test_a_home_is_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/mlruns") == (tmp_path / "mlruns").as_uri()


SECRETS = [
    ("http://me:s3cret@host:5000/path", "http://host:5000/path"),
    ("https://s3cret@host", "https://host"),
    ("http://me:s3#cr/e?t@host:5000", "http://host:5000"),
    ("http://host/a?api_token=s3cret&b=1", "http://host/a?b=1"),
    ("postgresql://me:s3cret@host:5432/mlflow", "postgresql://me@host:5432/mlflow"),
    ("postgresql+psycopg2://me:s3/cr@et@host/mlflow", "postgresql+psycopg2://me@host/mlflow"),
    ("mysql://me:s3cret@host/db?charset=utf8&ssl_password=x", "mysql://me@host/db?charset=utf8"),
    ("mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3Ds3cret", "mssql+pyodbc:///"),
]
PUBLIC = ["http://host:5000/a@b", "postgresql://me@host/db", "sqlite:////home/me@work:x/my.db", "file:///a@b", "uc"]


@pytest.mark.parametrize(("uri", "public"), [*SECRETS, *((uri, uri) for uri in PUBLIC)])
def test_no_password_is_kept_or_shown(uri: str, public: str) -> None:
    assert without_password(uri) == public
    assert without_password(public) == public
    if uri != public:
        assert scrub(f"no answer from {uri!r}: refused", uri) == f"no answer from {public!r}: refused"
        command = show_command(uri)
        assert public in command
        assert "s3cret" not in command
        if not uri.startswith("http"):
            assert shlex.split(command, comments=True)[-1] == "$MLFLOW_TRACKING_URI"


def test_passwords_in_texts_of_others_are_not_shown() -> None:
    assert scrub("at http://me:x@host/a, 'ftp://y:x@z': e@mail") == "at http://host/a, 'ftp://y@z': e@mail"
    assert scrub("FATAL: s3cret is wrong", "postgresql://me:s3cret@host/db") == "FATAL: *** is wrong"


@pytest.mark.parametrize(("uri", "public"), SECRETS)
def test_a_password_comes_back_from_the_environment(uri: str, public: str) -> None:
    assert with_password(public, {"MLFLOW_TRACKING_URI": uri}) == uri
    assert with_password(public, {}) == public
    assert with_password("http://another:5000", {"MLFLOW_TRACKING_URI": uri}) == "http://another:5000"


def test_a_store_in_the_results_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "results"
    for uri in (f"sqlite:///{root}/my.db", f"file://{root}/mlruns"):
        with pytest.raises(ValueError, match=r"to lie outside of the output directory"):
            check_outside(uri, root)
    for uri in (f"sqlite:///{tmp_path}/my.db", "http://host", "postgresql://host/db"):
        check_outside(uri, root)
