"""`meshproxy validate`: what it prints, and its exit status."""

import io
import json
import os
from pathlib import Path

import pytest

from meshproxy.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a}\nspec: {host: a.example.com}\n"
WARNED = GOOD + "status: {}\nextra: 1\n"
BAD = GOOD.replace("a.example.com", "'a b'")


def test_good_configuration_has_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    assert main(["validate", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 file, 1 resource: 0 errors, 0 warnings\n"


def test_warnings_alone_have_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(WARNED)
    assert main(["validate", str(tmp_path / "a.yaml")]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"WARNING {tmp_path}/a.yaml:6: DestinationRule default/a: extra: unknown field; ignored"
    assert last == "1 file, 1 resource: 0 errors, 1 warning"


def test_an_error_has_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(BAD)
    (tmp_path / "b.yml").write_text(GOOD.replace("name: a", "name: b"))
    assert main(["validate", str(tmp_path)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"ERROR   {tmp_path}/a.yaml:4: DestinationRule default/a: spec.host: ")
    assert last == "2 files, 1 resource: 1 error, 0 warnings"


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy"}))
    assert main(["validate", "-o", "json", str(path)]) == 1
    report = json.loads(capsys.readouterr().out)
    (problem,) = report.pop("problems")
    assert report == {"files": 1, "resources": 0, "errors": 1, "warnings": 0}
    assert (problem["severity"], problem["source"], problem["line"], problem["field"]) == (
        "ERROR",
        str(path),
        1,
        "kind",
    )
    assert problem["sentence"].startswith(f"{path}:1: kind: AuthorizationPolicy is not supported yet")


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(BAD.encode())))
    assert main(["validate", "-"]) == 1
    assert capsys.readouterr().out.startswith("ERROR   -:4: ")


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tmp_path / "none")]) == 1
    assert f"ERROR   {tmp_path}/none: cannot be read: no such file or directory\n" in capsys.readouterr().out


def test_a_mounted_config_map_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kubernetes links each file through `..data` to a hidden directory."""
    data = tmp_path / "..2024_01_01"
    data.mkdir()
    (data / "a.yaml").write_text(GOOD)
    os.symlink(data.name, tmp_path / "..data")
    os.symlink("..data/a.yaml", tmp_path / "a.yaml")
    assert main(["validate", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 file, 1 resource: 0 errors, 0 warnings\n"


def test_the_namespace_is_that_of_resources_that_name_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(WARNED)
    assert main(["validate", "--namespace", "edge", str(tmp_path)]) == 0
    assert "DestinationRule edge/a" in capsys.readouterr().out


def test_the_examples_have_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(EXAMPLES)]) == 0
    assert "0 errors" in capsys.readouterr().out


def test_a_terminal_gets_colours_unless_it_asks_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (tmp_path / "a.yaml").write_text(BAD)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for value, is_coloured in ((None, True), ("1", False)):
        if value is not None:
            monkeypatch.setenv("NO_COLOR", value)
        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        main(["validate", str(tmp_path)])
        assert ("\x1b[31mERROR" in terminal.getvalue()) is is_coloured
