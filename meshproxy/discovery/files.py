"""Resources from YAML files and directories, followed as they change.

Decides: which files count, when a file is whole enough to be read, when it is really gone.
Leaves to others: what the text means (resources.load), what survives an error (control.store).
"""

import asyncio
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshproxy.discovery.provider import Document, ResourceSink, Update
from meshproxy.discovery.watch import PathWatch
from meshproxy.resources.document import MAX_BYTES
from meshproxy.resources.load import load_text
from meshproxy.resources.problems import ConfigProblem, Severity

_log = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json")
GONE_AFTER_S = 0.1
"""A file must be missing for this long: editors and `rm -r` followed by a copy leave short gaps."""
_THREAD_ABOVE_BYTES = 128 * 1024
"""Parsing more than this would hold the control loop for longer than a scrape should wait."""

_Stamp = tuple[int, int, int, int]
"""device, inode, mtime in ns, size: any replacement of a file changes one of them."""


@dataclass(slots=True)
class _Text:
    path: str
    stamp: _Stamp | None
    data: bytes = b""
    why_not: str = ""


class FilesProvider:
    """A Provider for paths given by `-c`. A file is one document; a directory gives its *.yaml, *.yml and *.json.

    A `-c` path that vanishes as a whole keeps what it had (an unmounted volume is not an empty mesh); a file that
    vanishes from a directory takes its resources with it.
    """

    def __init__(self, paths: Sequence[str], default_namespace: str = "default", known: Iterable[str] = ()) -> None:
        """known: documents an earlier process reported; those that are not there any more are reported as gone."""
        self._paths = tuple(paths)
        self._default_namespace = default_namespace
        self._known = frozenset(known)
        self._stamps: dict[str, _Stamp | None] = {}
        """What was last read of each file; None: it could not be read."""
        self._roots: dict[str, str] = {}
        """File → the `-c` path it came from."""
        self._missing_since: dict[str, float] = {}
        self._polled: dict[str, _Stamp | None] = {}
        self._look = asyncio.Event()
        self._reads_all = False
        self._watch: PathWatch | None = None

    def reload(self) -> None:
        """Read every file again, changed or not (SIGHUP)."""
        self._reads_all = True
        self._look.set()

    async def run(self, sink: ResourceSink) -> None:
        loop = asyncio.get_running_loop()
        self._watch = PathWatch(self._paths, self._look.set, loop)
        self._watch.start()  # before the first look, so that nothing falls in between
        try:
            await self._look_once(sink, loop, is_first=True)
            while True:
                await self._look.wait()
                self._look.clear()
                await self._look_once(sink, loop)
        finally:
            self._watch.close()

    async def _look_once(self, sink: ResourceSink, loop: asyncio.AbstractEventLoop, is_first: bool = False) -> None:
        try:
            texts, gone = self._changes(loop.time(), is_first)
            if is_first:
                gone = self._known_and_gone()
            if sum(len(text.data) for text in texts) > _THREAD_ABOVE_BYTES:
                documents = await asyncio.to_thread(self._parse, texts)
            else:
                documents = self._parse(texts)
        except Exception:
            _log.exception("reading the configuration failed; what was read before stays")
            return
        if documents or gone or is_first:
            sink.apply(Update(documents=documents, gone=frozenset(gone)))

    def _changes(self, now: float, is_first: bool) -> tuple[list[_Text], list[str]]:
        """Read what differs from last time. Files that are being written, or are missing for a moment, wait."""
        assert self._watch is not None
        reads_all, self._reads_all = self._reads_all, False
        texts: list[_Text] = []
        found: set[str] = set()
        absent_roots: set[str] = set()
        for root in self._paths:
            paths = files_at(root)
            if paths is None:
                absent_roots.add(root)
                continue
            self._missing_since.pop(root, None)
            for path in paths:
                if path in found:
                    continue
                found.add(path)
                self._roots[path] = root
                self._missing_since.pop(path, None)
                stamp = stamp_of(path)
                if path in self._stamps and self._stamps[path] == stamp and not reads_all:
                    continue
                if not is_first:
                    if self._watch.is_being_written(path):
                        continue  # PathWatch calls again when it is closed
                    if self._watch.polls and self._polled.get(path) != stamp:
                        self._polled[path] = stamp  # whole once two polls see the same
                        continue
                text = _read(path, stamp)
                if text.stamp != stamp:
                    self._watch.look_again(GONE_AFTER_S)  # it changed under our hands
                    if not is_first:
                        continue
                self._stamps[path] = text.stamp
                texts.append(text)
        for root in absent_roots:
            if not is_first and now - self._missing_since.setdefault(root, now) < GONE_AFTER_S:
                self._watch.look_again(GONE_AFTER_S)
            elif root not in self._stamps or self._stamps[root] is not None or is_first:
                self._stamps[root] = None
                texts.append(_Text(root, None, why_not="no such file or directory"))
        gone = self._gone(found, absent_roots, now)
        return texts, gone

    def _known_and_gone(self) -> list[str]:
        """Of what an earlier process reported; below a `-c` path that is not there now it may still come back."""
        gone = []
        for path in self._known - self._stamps.keys():
            roots = [root for root in self._paths if path == root or path.startswith(root.rstrip("/") + "/")]
            absent = [root for root in roots if self._stamps.get(root, ()) is None]
            if absent:
                self._stamps[path] = None
                self._roots[path] = absent[0]
            else:
                gone.append(path)
        return gone

    def _gone(self, found: set[str], absent_roots: set[str], now: float) -> list[str]:
        assert self._watch is not None
        gone = []
        for path in self._stamps.keys() - found:
            root = self._roots.get(path, path)
            if root in absent_roots:
                continue
            since = self._missing_since.setdefault(path, now)
            if now - since < GONE_AFTER_S and path not in self._paths:
                self._watch.look_again(GONE_AFTER_S)
                continue
            gone.append(path)
        for path in gone:
            del self._stamps[path]
            self._roots.pop(path, None)
            self._missing_since.pop(path, None)
            self._polled.pop(path, None)
        return gone

    def _parse(self, texts: Sequence[_Text]) -> list[Document]:
        documents = []
        for text in texts:
            if text.why_not:
                problem = ConfigProblem(
                    severity=Severity.ERROR,
                    source=text.path,
                    line=0,
                    field="",
                    resource="",
                    message=f"cannot be read: {text.why_not}",
                    action="what it held before stays in effect",
                )
                documents.append(Document(source=text.path, problems=(problem,), is_unreadable=True))
            else:
                resources, problems = load_text(text.data, text.path, self._default_namespace)
                documents.append(Document(source=text.path, resources=resources, problems=problems))
        return documents


def files_at(root: str) -> list[str] | None:
    """The files a `-c` path stands for, sorted; None where the path does not exist.

    Hidden entries are left out: editors' swap files, and the `..data` directories of a mounted ConfigMap, whose files
    are linked from the directory itself.
    """
    if not os.path.isdir(root):
        return [root] if os.path.lexists(root) and os.path.exists(root) else None
    paths: list[str] = []
    for directory, directories, names in os.walk(root):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        paths.extend(
            os.path.join(directory, name) for name in names if name.endswith(SUFFIXES) and not name.startswith(".")
        )
    return sorted(paths)


def stamp_of(path: str) -> _Stamp | None:
    """None where the file cannot be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: str, stamp: _Stamp | None) -> _Text:
    try:
        # O_NONBLOCK: a FIFO in the directory must not hold us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return _Text(path, stamp, why_not="not a file")
            data = file.read(MAX_BYTES + 1)  # one more than may be, which load_text refuses
    except OSError as error:
        return _Text(path, stamp, why_not=(error.strerror or str(error)).lower())
    return _Text(path, stamp_of(path), data)
