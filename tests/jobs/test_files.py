from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytrust.jobs.files import read_json, write_json


def test_a_file_where_a_folder_would_be_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "stray").touch()
    assert read_json(tmp_path / "stray" / "config.json") is None


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    assert read_json(path) is None
    content = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(path, content)
    assert read_json(path) == content == json.loads(path.read_bytes())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == content  # what was there is still there
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=r"^Expected .*file\.json to be JSON, but it can't be read: .*\.$"):
        read_json(path)
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
