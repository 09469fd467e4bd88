"""What must hold of the repository itself, not of any one module."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.__main__ import CASES

ROOT = Path(__file__).resolve().parent.parent
MAKE_TARGETS = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def tracked_files() -> Iterator[Path]:
    """Files git knows; every file of the checkout where it is not a git checkout."""
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        names = [name for name in listing.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        everything = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [str(path) for path in everything if ".venv" not in path.parts]
    for name in names:
        path = ROOT / name
        if path.is_file():
            yield path


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def test_folders_import_one_way() -> None:
    found = Path(sys.executable).with_name("lint-imports")
    if not found.exists():
        pytest.skip("import-linter is not installed (pip install -e .[dev])")
    run = subprocess.run([found, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_files_name_nothing_of_the_machine_they_were_written_on() -> None:
    # A path or host of one machine works nowhere else, and says more than it should.
    parts = ("/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/", "pyp" + "i.org", "files.python" + "hosted")
    words = [re.escape(part) for part in parts]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked_files()
        for match in re.finditer(rf"(?<!\w)(?:{'|'.join(words)})", text_of(path))
    ]
    assert not found


def test_every_file_ends_with_a_newline_and_has_no_conflict_marks() -> None:
    for path in tracked_files():
        text = text_of(path)
        assert not text or text.endswith("\n"), path
        assert not re.search(r"^(<{7} |>{7} |={7}$)", text, re.MULTILINE), path


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)} → {target}"
        for path in tracked_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text_of(path))
        if not (path.parent / target).exists()
    ]
    assert not broken


def documented_commands() -> list[str]:
    """Lines of the documents' shell blocks that call make or meshproxy."""
    lines = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:sh|console|bash)\n(.*?)```", text_of(path), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
                line = re.sub(r"^(\.venv/bin/|sudo )", "", line)
                if line.startswith(("make ", "meshproxy ")) and line not in lines:
                    lines.append(line)
    return lines


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_exist(command: str) -> None:
    program, *arguments = command.split()
    if program == "make":
        assert arguments[0] in MAKE_TARGETS
        return
    name = arguments[0]
    help_text = _help_of(*arguments[:2]) if name == "ca" else _help_of(name)
    if name == "bench":
        cases = [argument for argument in arguments[1:] if re.fullmatch(r"[a-z]\w+", argument)]
        assert set(cases) <= set(CASES)
    for flag in (argument.split("=")[0] for argument in arguments[1:] if re.match(r"--?[a-z]", argument)):
        assert re.search(rf"(?<![\w-]){re.escape(flag)}\b", help_text), f"`meshproxy {name}` has no {flag}"


def _help_of(*command: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "meshproxy", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_files_named_in_documents_exist() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")]
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in documents
        for name in re.findall(r"`((?:meshproxy|bench|tests|examples|docs|docker|scripts)/[\w./-]+)`", text_of(path))
        if not (ROOT / name).exists()
    ]
    assert not missing


def test_the_package_needs_only_what_it_imports() -> None:
    declared = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["dependencies"]
    names = {re.split(r"[<>=;\[ ]", line)[0].lower() for line in declared}
    modules = {"uvloop": "uvloop", "httptools": "httptools", "pyyaml": "yaml", "cryptography": "cryptography"}
    modules["prometheus_client"] = "prometheus_client"
    sources = "\n".join(text_of(path) for path in (ROOT / "meshproxy").rglob("*.py"))
    unused = [name for name in names if not re.search(rf"\b(import|from) {modules.get(name, name)}\b", sources)]
    assert not unused
