import asyncio
import ctypes
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshproxy.discovery import watch
from meshproxy.discovery.watch import PathWatch


class Watched:
    def __init__(self, *paths: Path) -> None:
        self.changed = asyncio.Event()
        self.watch = PathWatch([str(path) for path in paths], self.changed.set, asyncio.get_running_loop())
        self.watch.start()

    async def change(self) -> None:
        async with asyncio.timeout(5):
            await self.changed.wait()
        self.changed.clear()


@pytest.fixture
async def directory(tmp_path: Path) -> AsyncIterator[tuple[Path, Watched]]:
    path = tmp_path / "conf"
    path.mkdir()
    watched = Watched(path)
    assert not watched.watch.polls
    yield path, watched
    watched.watch.close()


async def test_a_new_file_a_rename_over_it_and_its_end_are_seen(directory: tuple[Path, Watched]) -> None:
    path, watched = directory
    (path / "a.yaml").write_text("a")
    await watched.change()
    (path / ".a.yaml.swp").write_text("b")
    await watched.change()
    os.replace(path / ".a.yaml.swp", path / "a.yaml")
    await watched.change()
    (path / "a.yaml").unlink()
    await watched.change()


async def test_a_file_that_is_being_written_is_known_until_it_is_closed(directory: tuple[Path, Watched]) -> None:
    path, watched = directory
    file = path / "a.yaml"
    with file.open("w") as writer:
        await watched.change()  # created
        writer.write("half")
        writer.flush()
        async with asyncio.timeout(5):
            while not watched.watch.is_being_written(str(file)):  # noqa: ASYNC110 - the event has no callback
                await asyncio.sleep(0)
    await watched.change()
    assert not watched.watch.is_being_written(str(file))


async def test_a_directory_that_is_removed_and_made_again_is_followed(directory: tuple[Path, Watched]) -> None:
    path, watched = directory
    path.rmdir()
    await watched.change()
    path.mkdir()
    await watched.change()
    (path / "a.yaml").write_text("a")
    await watched.change()


async def test_a_directory_inside_is_followed(directory: tuple[Path, Watched]) -> None:
    path, watched = directory
    (path / "team").mkdir()
    await watched.change()
    (path / "team" / "a.yaml").write_text("a")
    await watched.change()


def mount(directory: Path, version: str, text: str) -> None:
    """Put a version of a ConfigMap in place as the kubelet does: a new directory, and `..data` swapped to it."""
    (directory / f"..{version}").mkdir()
    (directory / f"..{version}" / "mesh.yaml").write_text(text)
    (directory / "..data_tmp").symlink_to(f"..{version}")
    os.replace(directory / "..data_tmp", directory / "..data")
    if not (directory / "mesh.yaml").is_symlink():
        (directory / "mesh.yaml").symlink_to("..data/mesh.yaml")


@pytest.mark.parametrize("what", ["the directory", "one file"])
async def test_the_swap_of_a_mounted_configmap_is_seen(tmp_path: Path, what: str) -> None:
    mount(tmp_path, "1", "one")
    watched = Watched(tmp_path if what == "the directory" else tmp_path / "mesh.yaml")
    mount(tmp_path, "2", "two")
    await watched.change()
    assert (tmp_path / "mesh.yaml").read_text() == "two"
    mount(tmp_path, "3", "three")
    await watched.change()
    watched.watch.close()


async def test_a_file_reached_through_a_linked_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "a.yaml").write_text("1")
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "a.yaml").write_text("2")
    (tmp_path / "current").symlink_to("v1")
    watched = Watched(tmp_path / "current" / "a.yaml")
    (tmp_path / "next").symlink_to("v2")
    os.replace(tmp_path / "next", tmp_path / "current")
    await watched.change()
    (tmp_path / "v2" / "a.yaml").write_text("3")
    await watched.change()
    watched.watch.close()


async def test_a_path_that_does_not_exist_yet_is_waited_for(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "later" / "conf")
    (tmp_path / "later").mkdir()
    await watched.change()
    (tmp_path / "later" / "conf").mkdir()
    await watched.change()
    (tmp_path / "later" / "conf" / "a.yaml").write_text("a")
    await watched.change()
    watched.watch.close()


async def test_neighbours_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a")
    watched = Watched(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("b")
    (tmp_path / "a.yaml").write_text("c")
    await watched.change()
    (tmp_path / "b.yaml").write_text("d")
    for _ in range(3):
        await asyncio.sleep(0)
    assert not watched.changed.is_set()
    watched.watch.close()


async def test_without_inotify_it_polls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoInotify:
        def inotify_init1(self, _flags: int) -> int:
            ctypes.set_errno(24)
            return -1

    monkeypatch.setattr(watch.ctypes, "CDLL", lambda *_, **__: NoInotify())
    monkeypatch.setattr(watch, "POLL_S", 0.001)
    watched = Watched(tmp_path)
    assert watched.watch.polls
    await watched.change()
    await watched.change()
    watched.watch.close()
