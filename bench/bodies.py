"""1 GiB up and 1 GiB down, with a length and chunked, through one proxy and through a pair with mTLS: are the bytes the
same at both ends, and how much memory do the proxies take for it?

The origin is a program of its own: python -m bench.bodies PORT. It hashes what it sends or receives and tells the hash
when asked directly, so that both ends are compared without trusting what lies between.
"""

import hashlib
import http.client
import random
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench import certificates, mesh, pairs
from bench.case import Case, Contender, Figure, Outcome, Settings, say
from bench.load import Target
from bench.process import BenchError, Group, Workspace, http_get
from bench.services import ECHO_HOST, LOCAL_ZONE, Place, Service

_BODY_BYTES = 1 << 30
_PIECE_BYTES = 64 << 10
_PAUSE_AT_BYTES = _BODY_BYTES // 2
_PAUSE_S = 1.0
"""Halfway the receiver stops reading: what lies between must hold the sender back, not the bytes."""
_GROWTH_AT_MOST_MIB = 4.0
_POOL = random.Random(0).randbytes(_PIECE_BYTES + 4096)


def pieces(total: int) -> Iterator[bytes]:
    """`total` bytes in which no two pieces are alike: one lost, doubled or out of place changes the hash."""
    number = 0
    while total > 0:
        length = min(_PIECE_BYTES, total)
        shift = number % 4096
        yield (number.to_bytes(8, "big") + _POOL[shift : shift + _PIECE_BYTES - 8])[:length]
        total -= length
        number += 1


class _Origin(BaseHTTPRequestHandler):
    """GET /length/N and /chunked/N send N bytes; POST takes any body; GET /digest: hash of the last body either way."""

    protocol_version = "HTTP/1.1"
    digest = ""

    def do_GET(self) -> None:
        _, framing, *rest = self.path.split("/")
        if framing not in ("length", "chunked"):
            self._answer(_Origin.digest)
            return
        total = int(rest[0])
        self.send_response(200)
        if framing == "length":
            self.send_header("content-length", str(total))
        else:
            self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        seen = hashlib.sha256()
        for piece in pieces(total):
            seen.update(piece)
            self.wfile.write(piece if framing == "length" else b"%x\r\n%b\r\n" % (len(piece), piece))
        if framing == "chunked":
            self.wfile.write(b"0\r\n\r\n")
        _Origin.digest = seen.hexdigest()

    def do_POST(self) -> None:
        seen = hashlib.sha256()
        received = 0
        for piece in self._body():
            seen.update(piece)
            if received < _PAUSE_AT_BYTES <= received + len(piece):
                time.sleep(_PAUSE_S)
            received += len(piece)
        _Origin.digest = seen.hexdigest()
        self._answer(str(received))

    def _body(self) -> Iterator[bytes]:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            yield from self._exactly(int(self.headers.get("content-length", "0")))
            return
        while (length := int(self.rfile.readline().split(b";")[0], 16)) > 0:
            yield from self._exactly(length)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _exactly(self, length: int) -> Iterator[bytes]:
        while length > 0 and (data := self.rfile.read(min(length, _PIECE_BYTES))):
            length -= len(data)
            yield data

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def bodies(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        outcome.pinning = workspace.pinning.name
        origin_port = workspace.port()
        command = [sys.executable, "-m", "bench.bodies", str(origin_port)]
        origin = workspace.start("body origin", command, workspace.pinning.origin)
        workspace.wait_http(origin, origin_port, "/digest")
        port = workspace.port()
        service = Service(ECHO_HOST, (Place("127.0.0.1", origin_port, LOCAL_ZONE),))
        plain = mesh.start(workspace, port, mesh.outbound_resources([service], port))
        issued = certificates.issue(workspace.path / "certs", (pairs.CLIENT, pairs.SERVER))
        for contender in (
            Contender("plain", Target("127.0.0.1", port, ECHO_HOST), (plain.group,)),
            pairs.mesh_pair(workspace, origin_port, issued, "HTTP"),
        ):
            name = "plain" if len(contender.groups) == 1 else "mTLS pair"
            _carry_all(outcome, name, contender, origin_port)


def _carry_all(outcome: Outcome, name: str, contender: Contender, origin_port: int) -> None:
    target = contender.target
    for is_upload, framing in ((True, "length"), (True, "chunked"), (False, "length"), (False, "chunked")):
        _carry(target, is_upload, framing, 1024)  # connections are up, code is loaded
    base = [resident_mib(group) for group in contender.groups]
    growth = [0.0 for _ in base]
    equal = 0
    for is_upload, framing in ((True, "length"), (True, "chunked"), (False, "length"), (False, "chunked")):
        what = f"{'up' if is_upload else 'down'} {framing}"
        for at, group in enumerate(contender.groups):
            forget_peaks(group)
            base[at] = min(base[at], resident_mib(group))  # what was given back meanwhile may not hide a growth
        started = time.monotonic()
        ours = _carry(target, is_upload, framing, _BODY_BYTES)
        took_s = time.monotonic() - started - _PAUSE_S
        theirs = http_get(origin_port, "/digest")[1].decode()
        peaks = [peak_mib(group) - before for group, before in zip(contender.groups, base, strict=True)]
        growth = [max(pair) for pair in zip(growth, peaks, strict=True)]
        equal += ours == theirs
        outcome.rows[f"{name} {what}"] = {
            "mib_s": _BODY_BYTES / (1 << 20) / took_s,
            "growth_mib": max(peaks),
            "is_equal": float(ours == theirs),
        }
        say(
            f"  {outcome.case} {name} {what}: {_BODY_BYTES / (1 << 20) / took_s:.0f} MiB/s, peak over the start "
            f"{', '.join(f'{peak:.1f}' for peak in peaks)} MiB, sha256 {'equal' if ours == theirs else 'DIFFERS'}"
        )
    grown = f"{name}: growth of a proxy's resident memory, 1 GiB each way"
    outcome.figures.append(Figure(grown, max(growth), "MiB", at_most=_GROWTH_AT_MOST_MIB))
    outcome.figures.append(Figure(f"{name}: bodies of 4 with equal sha256 at both ends", equal, "bodies", at_least=4))


def _carry(target: Target, is_upload: bool, framing: str, size: int) -> str:
    """One body there or back; sha256 of it at this end."""
    connection = http.client.HTTPConnection(target.address, target.port, timeout=60)
    seen = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for piece in pieces(size):
            seen.update(piece)
            yield piece

    try:
        if is_upload:
            headers = {"host": target.host}
            headers |= {"content-length": str(size)} if framing == "length" else {"transfer-encoding": "chunked"}
            connection.request("POST", "/", hashed(), headers, encode_chunked=framing == "chunked")
            answer = connection.getresponse()
            received = answer.read()
            if answer.status != 200 or int(received) != size:
                raise BenchError(f"upload of {size} bytes: {answer.status}, the origin received {received[:20]!r}")
            return seen.hexdigest()
        connection.request("GET", f"/{framing}/{size}", headers={"host": target.host})
        answer = connection.getresponse()
        buffer = bytearray(_PIECE_BYTES)
        view = memoryview(buffer)
        total = 0
        while count := answer.readinto(buffer):
            seen.update(view[:count])
            if total < _PAUSE_AT_BYTES <= total + count:
                time.sleep(_PAUSE_S)
            total += count
        if answer.status != 200 or total != size:
            raise BenchError(f"download of {size} bytes: {answer.status}, {total} bytes arrived")
        return seen.hexdigest()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"{'upload' if is_upload else 'download'} of {size} bytes: {error!r}") from error
    finally:
        connection.close()


def forget_peaks(group: Group) -> None:
    """From now on peak_mib speaks of what follows. Source: proc(5), clear_refs, value 5."""
    for pid in group.pids():
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident_mib(group: Group) -> float:
    """Of all its processes, shared pages counted in each."""
    return _status_mib(group, "VmRSS:")


def peak_mib(group: Group) -> float:
    """The same at its highest, each process at its own moment: never less than what they had at once."""
    return _status_mib(group, "VmHWM:")


def _status_mib(group: Group, field: str) -> float:
    kib = 0
    for pid in group.pids():
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        kib += sum(int(line.split()[1]) for line in lines if line.startswith(field))
    return kib / 1024


CASES = (Case("bodies", "1 GiB up and down, with a length and chunked, plain and mTLS: bytes and memory", bodies),)

if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Origin).serve_forever()
