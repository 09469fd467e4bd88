"""These touch real files: what is decided here is when a file counts."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from meshproxy.control.store import ResourceStore
from meshproxy.discovery.files import FilesProvider, files_at


def service_entry(name: str, host: str = "a.example") -> str:
    return (
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n"
        f"metadata:\n  name: {name}\nspec:\n  hosts: [{host}]\n"
        "  ports:\n  - {number: 80, name: http, protocol: HTTP}\n  resolution: DNS\n---\n"
    )


class Followed:
    """A provider that feeds a store; `change()` waits for the next update that changed something."""

    def __init__(self, *paths: Path) -> None:
        self.changed = asyncio.Event()
        self.store = ResourceStore(self.changed.set)
        self.provider = FilesProvider([str(path) for path in paths])
        self.task = asyncio.get_running_loop().create_task(self.provider.run(self.store))

    async def change(self) -> None:
        async with asyncio.timeout(5):
            await self.changed.wait()
        self.changed.clear()

    def hosts(self) -> dict[str, str]:
        return {resource.name: resource.spec["hosts"][0] for resource in self.store.resources()}


@asynccontextmanager
async def followed(*paths: Path) -> AsyncIterator[Followed]:
    it = Followed(*paths)
    await it.change()
    yield it
    it.task.cancel()
    await asyncio.gather(it.task, return_exceptions=True)


async def test_a_change_of_any_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service_entry("a"))
    async with followed(tmp_path) as it:
        (tmp_path / "b.yml").write_text(service_entry("b"))
        await it.change()
        (tmp_path / ".new").write_text(service_entry("a", "new.example"))
        os.replace(tmp_path / ".new", tmp_path / "a.yaml")
        await it.change()
        assert it.hosts() == {"a": "new.example", "b": "a.example"}
        (tmp_path / "a.yaml").unlink()
        await it.change()
        assert it.hosts() == {"b": "a.example"}


async def test_half_a_file_is_not_read_before_it_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service_entry("a") + service_entry("b"))
    async with followed(tmp_path) as it:
        with file.open("w") as writer:  # truncates: an empty file is half of any file
            writer.write(service_entry("a", "new.example"))
            writer.flush()
            (tmp_path / "other.yaml").write_text(service_entry("other"))
            await it.change()
            assert it.hosts() == {"a": "a.example", "b": "a.example", "other": "a.example"}
            writer.write(service_entry("b", "new.example"))
        await it.change()
        assert it.hosts() == {"a": "new.example", "b": "new.example", "other": "a.example"}


async def test_a_broken_file_keeps_what_it_had(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service_entry("a"))
    async with followed(tmp_path) as it:
        file.write_text("kind: [")
        await it.change()
        assert it.hosts() == {"a": "a.example"}
        (problem,) = it.store.problems()
        assert problem.source == str(file)
        file.write_text(service_entry("a", "fixed.example"))
        await it.change()
        assert it.hosts() == {"a": "fixed.example"}
        assert it.store.problems() == []


async def test_a_path_that_vanishes_as_a_whole_keeps_what_it_had(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "a.yaml").write_text(service_entry("a"))
    async with followed(conf) as it:
        os.rename(conf, tmp_path / "away")
        await it.change()
        assert it.hosts() == {"a": "a.example"}
        (problem,) = it.store.problems()
        assert problem.sentence().endswith("no such file or directory; what it held before stays in effect")
        os.rename(tmp_path / "away", conf)
        await it.change()
        assert it.store.problems() == []
        assert it.hosts() == {"a": "a.example"}


async def test_a_single_file_is_followed_through_its_replacement(tmp_path: Path) -> None:
    file = tmp_path / "mesh.conf"
    file.write_text(service_entry("a"))
    async with followed(file) as it:
        (tmp_path / "new").write_text(service_entry("a", "new.example"))
        os.replace(tmp_path / "new", file)
        await it.change()
        assert it.hosts() == {"a": "new.example"}


async def test_the_files_of_a_mounted_configmap_are_swapped_together(tmp_path: Path) -> None:
    def mount(version: str) -> None:
        (tmp_path / f"..{version}").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"..{version}" / f"{name}.yaml").write_text(service_entry(name, f"{version}.example"))
        (tmp_path / "..data_tmp").symlink_to(f"..{version}")
        os.replace(tmp_path / "..data_tmp", tmp_path / "..data")

    mount("1")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")
    async with followed(tmp_path) as it:
        assert it.hosts() == {"a": "1.example", "b": "1.example"}
        mount("2")
        await it.change()
        assert it.hosts() == {"a": "2.example", "b": "2.example"}


async def test_a_pipe_and_an_unreadable_link_are_reported_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "a.yaml").write_text(service_entry("a"))
    async with followed(tmp_path) as it:
        assert it.hosts() == {"a": "a.example"}
        sentences = sorted(problem.sentence() for problem in it.store.problems())
        assert [sentence.rpartition("/")[2].partition(";")[0] for sentence in sentences] == [
            "loop.yaml: cannot be read: too many levels of symbolic links",
            "pipe.yaml: cannot be read: not a file",
        ]


async def test_reload_reads_everything_again(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service_entry("a"))
    async with followed(tmp_path) as it:
        stamp = file.stat()
        # The same size, inode and time: nothing tells this change from none but reading it.
        with file.open("r+") as writer:
            writer.write(service_entry("a", "b.example"))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        it.provider.reload()
        await it.change()
        assert it.hosts() == {"a": "b.example"}


def test_hidden_and_other_files_do_not_count(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.json", ".swp.yaml", "notes.txt", "c.yaml~"):
        (tmp_path / name).write_text("")
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "d.yaml").write_text("")
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "e.yml").write_text("")
    assert files_at(str(tmp_path)) == [str(tmp_path / name) for name in ("a.json", "b.yaml", "team/e.yml")]
    assert files_at(str(tmp_path / "absent")) is None
