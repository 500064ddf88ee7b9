"""The results file: where it says it was measured, how it grows, and what is said of a bad one."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest

from benchmarks import schema
from benchmarks.environment import commit, environment
from benchmarks.schema import ResultsError, Row


def a_row(**others: object) -> Row:
    return Row("activation", "gelu", "forward", [4], "flat", "float32", "torch", **others)  # type: ignore[arg-type]


def an_environment() -> schema.Environment:
    return environment("cpu", 12.34, "a test")


def test_environment_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNORM_COMMIT", "0123abc-dirty")
    found = an_environment()
    assert (found.commit, found.dirty) == ("0123abc", True)
    assert found.on_cpu
    assert found.device.startswith("CPU ")


@pytest.mark.parametrize(
    "new, dirty",
    [
        ("notes.txt", False),
        ("benchmarks/results/a/r.json", False),
        ("csrc/built.o", False),  # ignored
        ("csrc/gelu.cu", True),
        ("fastnorm/ops/new/triton.py", True),
        ("benchmarks/faster.py", True),
    ],
)
def test_a_new_source_is_no_clean_commit(
    new: str, dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(("git", *identity, *arguments), cwd=tmp_path, check=True)

    (tmp_path / ".gitignore").write_text("*.o\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.delenv("FASTNORM_COMMIT", raising=False)
    monkeypatch.setattr("benchmarks.environment.ROOT", tmp_path)
    sha, clean = commit()
    assert (len(sha), clean) == (40, False)
    (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / new).write_text("new")
    assert commit() == (sha, dirty)


def test_every_append_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    schema.save(schema.Results(an_environment()), path)
    assert schema.load(path).rows == []
    for i in range(3):
        schema.append(path, a_row(ms_median=float(i), error=math.nan))
        rows = schema.load(path).rows
        assert [row.ms_median for row in rows] == [float(n) for n in range(i + 1)]
        assert rows[-1].error is None  # JSON has no NaN


@pytest.mark.parametrize(
    "text, message",
    [
        ("not JSON", "is not JSON"),
        ("[]", "names no schema"),
        ('{"schema": 2}', "is of schema 2; this version reads schema 1"),
        ('{"schema": 1, "rows": 3}', "has no list of rows"),
        ('{"schema": 1, "environment": {}, "rows": []}', "lacks .*its fields are device, driver"),
    ],
)
def test_a_file_of_another_schema(text: str, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        schema.parse(text, "there")


def test_a_row_with_an_unknown_mode(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    schema.save(schema.Results(an_environment(), [a_row()]), path)
    path.write_text(path.read_text().replace('"forward"', '"sideways"'))
    with pytest.raises(ResultsError, match="mode 'sideways': choose one of forward, backward"):
        schema.load(path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("ms_median", "fast", "ms_median is 'fast', of type str; it is to be float . None"),
        ("ms_median", True, "ms_median is True, of type bool"),
        ("shape", "4x4", "shape is '4x4', of type str"),
        ("shape", [4, 4.5], "shape is .*of type list; it is to be list.int."),
        ("floor_bytes", 1.5, "floor_bytes is 1.5, of type float; it is to be int . None"),
        ("ok", 1, "ok is 1, of type int; it is to be bool"),
        ("note", None, "note is None, of type NoneType; it is to be str"),
    ],
)
def test_a_field_of_another_type(field: str, value: object, message: str) -> None:
    rows = [dataclasses.asdict(a_row()), dataclasses.asdict(a_row()) | {field: value}]
    environment = dataclasses.asdict(an_environment())
    text = json.dumps({"schema": 1, "environment": environment, "rows": rows})
    with pytest.raises(ResultsError, match=f"there: row 1: {message}"):
        schema.parse(text, "there")


def test_a_field_of_the_environment_of_another_type() -> None:
    environment = dataclasses.asdict(an_environment()) | {"peers": {"apex": 3}}
    text = json.dumps({"schema": 1, "environment": environment, "rows": []})
    with pytest.raises(ResultsError, match=r"there: environment: peers is \{'apex': 3\}"):
        schema.parse(text, "there")


def test_append_refuses_a_file_that_was_edited(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    schema.save(schema.Results(an_environment()), path)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ResultsError, match="edited by hand"):
        schema.append(path, a_row())
