"""Tells that something under some paths may have changed: inotify by ctypes, or a poll each second without it.

Decides: which directories to watch so that no way of replacing a file is missed: written in place, renamed over
(editors), behind a symlink that is swapped (a mounted ConfigMap's `..data`), the directory removed and made again.
Leaves to others: what changed (the caller looks again).
Source: inotify(7).
"""

import ctypes
import errno
import logging
import os
import struct
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable, Iterable

_log = logging.getLogger(__name__)

_IN_MODIFY = 0x2
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x01000000
_ENTRIES = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
_CONTENTS = _ENTRIES | _IN_MODIFY | _IN_CLOSE_WRITE | _IN_ATTRIB
_EVENT = struct.Struct("iIII")

SETTLE_S = 0.01
"""Events come in bursts; one look serves those of this long."""
WRITING_S = 2.0
"""A writer that neither writes nor closes for this long is taken to be done."""
POLL_S = 1.0
_MAX_DEPTH = 16


class PathWatch:
    """Calls on_change (on the loop) soon after something at or below one of the paths may have changed."""

    def __init__(self, paths: Iterable[str], on_change: Callable[[], None], loop: AbstractEventLoop) -> None:
        self._paths = tuple(os.path.abspath(path) for path in paths)
        self._on_change = on_change
        self._loop = loop
        self._inotify = -1
        self._libc: ctypes.CDLL | None = None
        self._watched: dict[int, tuple[str, frozenset[str] | None]] = {}
        """Watch descriptor → its directory and the entries that matter there (None: all)."""
        self._writing: dict[str, float] = {}
        self._timer: TimerHandle | None = None
        self._polls = False

    @property
    def polls(self) -> bool:
        """No inotify: on_change comes each second, whether something changed or not."""
        return self._polls

    def start(self) -> None:
        try:
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._inotify = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._inotify < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self._watch_all()
        except (OSError, AttributeError) as error:
            self._poll_instead(str(error))
            return
        self._loop.add_reader(self._inotify, self._readable)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._inotify >= 0:
            self._loop.remove_reader(self._inotify)
            os.close(self._inotify)
            self._inotify = -1

    def is_being_written(self, path: str) -> bool:
        """Someone wrote to the file and has not closed it: what it holds now is half of something."""
        since = self._writing.get(os.path.realpath(path))
        return since is not None and self._loop.time() - since < WRITING_S

    def look_again(self, delay_s: float) -> None:
        """Call on_change after delay_s seconds, unless it is called sooner."""
        if self._timer is not None:
            if self._timer.when() <= self._loop.time() + delay_s:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._polls:
            self.look_again(POLL_S)
        else:
            try:
                self._watch_all()
            except OSError as error:
                self.close()
                self._poll_instead(str(error))
            if self._writing:
                now = self._loop.time()
                self._writing = {path: at for path, at in self._writing.items() if now - at < WRITING_S}
                if self._writing:
                    self.look_again(WRITING_S)
        self._on_change()

    def _poll_instead(self, why: str) -> None:
        _log.warning("cannot watch %s by inotify (%s): polling each second", ", ".join(self._paths), why)
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1
        self._polls = True
        self.look_again(POLL_S)

    def _watch_all(self) -> None:
        """Watch what the paths lead through now; drop what they led through before."""
        assert self._libc is not None
        wanted: dict[str, set[str] | None] = {}
        for path in self._paths:
            _lead_to(path, wanted)
        watched: dict[int, tuple[str, frozenset[str] | None]] = {}
        for directory, names in wanted.items():
            mask = _ENTRIES if names is not None and not self._holds_a_path(directory, names) else _CONTENTS
            descriptor = self._libc.inotify_add_watch(self._inotify, os.fsencode(directory), mask)
            if descriptor < 0:
                code = ctypes.get_errno()
                if code in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                    continue  # gone since we looked, or not ours to see: its parent is watched
                raise OSError(code, os.strerror(code))
            watched[descriptor] = (directory, None if names is None else frozenset(names))
        for descriptor in self._watched.keys() - watched.keys():
            self._libc.inotify_rm_watch(self._inotify, descriptor)
        self._watched = watched

    def _holds_a_path(self, directory: str, names: set[str]) -> bool:
        """The directory holds a watched file itself, not only a step on the way to one."""
        return any(not os.path.isdir(os.path.join(directory, name)) for name in names)

    def _readable(self) -> None:
        try:
            data = os.read(self._inotify, 65536)
        except BlockingIOError:
            return
        matters = False
        offset = 0
        while offset < len(data):
            descriptor, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            offset += length
            if mask & _IN_Q_OVERFLOW:
                matters = True
                continue
            place = self._watched.get(descriptor)
            if place is None:
                continue
            directory, names = place
            if mask & _IN_IGNORED:
                matters = True  # the directory itself went away
                continue
            if names is not None and name not in names:
                continue
            path = os.path.join(directory, name)
            if mask & _IN_MODIFY:
                self._writing[path] = self._loop.time()
            else:
                if not mask & _IN_ATTRIB:
                    self._writing.pop(path, None)
                matters = True
        if matters:
            self.look_again(SETTLE_S)
        elif self._writing:
            self.look_again(WRITING_S)


def _lead_to(path: str, wanted: dict[str, set[str] | None], depth: int = 0) -> None:
    """Add the directories whose entries decide what `path` is: each step, each symlink's steps, all below it."""
    if depth > _MAX_DEPTH:
        return
    at = "/"
    for part in path.strip("/").split("/"):
        names = wanted.setdefault(at, set())
        if names is not None:
            names.add(part)
        step = os.path.join(at, part)
        if os.path.islink(step):
            target = os.path.join(at, os.readlink(step))
            _lead_to(os.path.normpath(target), wanted, depth + 1)
            step = os.path.realpath(step)
        at = step
        if not os.path.isdir(at):
            return
    _everything_below(at, wanted, depth)


def _everything_below(directory: str, wanted: dict[str, set[str] | None], depth: int) -> None:
    wanted[directory] = None
    if depth > _MAX_DEPTH:
        return
    try:
        entries = list(os.scandir(directory))
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_symlink():
                _lead_to(os.path.normpath(os.path.join(directory, os.readlink(entry.path))), wanted, depth + 1)
            elif entry.is_dir() and not entry.name.startswith("."):
                _everything_below(entry.path, wanted, depth + 1)
        except OSError:
            continue
