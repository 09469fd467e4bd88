"""`meshproxy status|clusters|routes|listeners|certs|config`: what a running proxy says of itself, as tables or JSON.

Decides: what a table shows of the admin interface's JSON. Leaves to others: the JSON (admin.views).
"""

import argparse
import http.client
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from meshproxy.errors import ConfigError

Json = Any

DEFAULT_ADMIN = "127.0.0.1:15000"
_TIMEOUT_S = 10.0
_RED, _YELLOW, _GREEN, _BOLD, _RESET = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[1m", "\x1b[0m"
_WARN_BELOW_S = 7 * 86400
"""Certificates closer to their end than this are shown in yellow."""


def add_parser(subparsers: Any) -> None:
    for name, help, run in (
        ("status", "state, workers, memory and problems of a running proxy", status),
        ("clusters", "clusters and endpoints with health and counts", clusters),
        ("routes", "which request goes where", routes),
        ("listeners", "what the proxy listens on", listeners),
        ("certs", "certificates in use and when they end", certs),
        ("config", "the configuration in effect", config),
    ):
        parser = subparsers.add_parser(name, help=help, description=f"Show {help}.")
        parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default: table")
        parser.add_argument(
            "--admin",
            metavar="HOST:PORT",
            default=os.environ.get("MESHPROXY_ADMIN", DEFAULT_ADMIN),
            help=f"the proxy's admin address; default: MESHPROXY_ADMIN or {DEFAULT_ADMIN}",
        )
        if name == "config":
            parser.add_argument("--resource", metavar="NAME", help="only workloads, listeners, route_tables, …")
        parser.set_defaults(run=run)


# ── asking ──


class _Admin:
    """The admin interface of a running proxy. Every failure is a ConfigError of one sentence."""

    def __init__(self, address: str) -> None:
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"--admin {address!r} is not of the form HOST:PORT")
        self._address = address
        self._host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
        self._port = int(port)

    def get(self, path: str) -> Json:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except ConnectionRefusedError:
            raise ConfigError(f"no proxy answers on {self._address}: connection refused") from None
        except TimeoutError:
            raise ConfigError(f"no answer from {self._address} within {_TIMEOUT_S:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(
                f"{self._address} cannot be asked: {_one_line(str(error)) or type(error).__name__}"
            ) from None
        finally:
            connection.close()
        if response.status != 200:
            said = _one_line(body[:200].decode("utf-8", "replace"))
            raise ConfigError(f"{self._address} answers {path} with {response.status}: {said}")
        try:
            return json.loads(body)
        except ValueError:
            raise ConfigError(f"{self._address} does not answer like a proxy's admin interface") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(arguments: argparse.Namespace, path: str, as_table: "Callable[[Json, Painter], str]") -> int:
    _write(arguments, _Admin(arguments.admin).get(path), as_table)
    return 0


def _write(arguments: argparse.Namespace, answer: Json, as_table: "Callable[[Json, Painter], str]") -> None:
    if arguments.output == "json":
        text = json.dumps(answer, indent=2) + "\n"
    else:
        try:
            text = as_table(answer, Painter.of(sys.stdout))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            raise ConfigError(f"{arguments.admin} does not answer like a proxy's admin interface") from None
    sys.stdout.write(text)


# ── tables ──


class Painter:
    """Colours where a person looks on, none where a program reads."""

    def __init__(self, *, has_colours: bool) -> None:
        self._has_colours = has_colours

    @classmethod
    def of(cls, stream: TextIO) -> "Painter":
        return cls(has_colours=stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")

    def __call__(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_RESET}" if self._has_colours else text


Cell = str | tuple[str, str]
"""Text, or (colour, text)."""


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], paint: Painter) -> str:
    """Columns as wide as their widest cell, two spaces apart; numbers to the right."""
    plain = [[(cell if isinstance(cell, tuple) else ("", cell)) for cell in row] for row in rows]
    if not plain:
        return "none\n"
    widths = [max(len(name), *(len(row[at][1]) for row in plain)) for at, name in enumerate(head)]
    is_numeric = [all(_is_number(row[at][1]) for row in plain) for at in range(len(head))]

    def line(cells: Sequence[tuple[str, str]]) -> str:
        parts = []
        for at, (colour, text) in enumerate(cells):
            text = _printable(text)
            padding = " " * (widths[at] - len(text))
            painted = paint(colour, text) if colour else text
            parts.append(padding + painted if is_numeric[at] else painted + padding)
        return "  ".join(parts).rstrip() + "\n"

    return line([(_BOLD, name) for name in head]) + "".join(map(line, plain))


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).removesuffix("%").isdecimal()


def _printable(text: str) -> str:
    """Names come from the configuration: none of them may drive the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


# ── commands ──


def status(arguments: argparse.Namespace) -> int:
    admin = _Admin(arguments.admin)
    answer = {"server": admin.get("/server_info"), "memory": admin.get("/memory")}
    _write(arguments, answer | admin.get("/problems?format=json"), status_table)
    return 0


def status_table(answer: Json, paint: Painter) -> str:
    server, memory = answer["server"], answer["memory"]
    snapshot = server["snapshot"]
    state = server["state"]
    node = " ".join(filter(None, (server["node"]["id"], server["node"]["locality"])))
    lines = [
        f"meshproxy {server['version']}  {paint(_GREEN if state == 'LIVE' else _YELLOW, state)}"
        f"  up {_duration(int(server['uptime_current_epoch'].removesuffix('s')))}" + (f"  {node}" if node else ""),
        f"snapshot {snapshot['version']}, published {snapshot['published_at'] or 'never'}: "
        + ", ".join(
            f"{snapshot[kind]} {kind.replace('_', ' ')}"
            for kind in ("workloads", "listeners", "route_tables", "clusters", "endpoints")
        ),
        "",
    ]
    by_pid = {one["pid"]: one for one in server["workers"]}
    rows: list[list[Cell]] = []
    for one in memory["processes"]:
        worker = by_pid.get(one["pid"])
        said: Cell = "-"
        if worker is not None:
            said = (_GREEN, "current") if worker["is_current"] else (_YELLOW, worker["snapshot_version"] or "none yet")
        rows.append(
            [
                one["name"],
                str(one["pid"]),
                _mib(one["pss_bytes"]),
                _mib(one["private_bytes"]),
                f"{one['cpu_s']:.1f}",
                "-" if one["open_fds"] is None else str(one["open_fds"]),
                said,
            ]
        )
    lines.append(table(("PROCESS", "PID", "PSS MiB", "PRIVATE MiB", "CPU s", "FDS", "SNAPSHOT"), rows, paint))
    if server["worker_restarts"]:
        lines.append(paint(_YELLOW, f"{server['worker_restarts']} workers died and were replaced"))
    problems = answer["problems"]
    for problem in problems:
        colour = _RED if problem["severity"] == "ERROR" else _YELLOW
        lines.append(f"{paint(colour, problem['severity'].lower())}: {problem['sentence']}")
    if not problems:
        lines.append("no problems in the configuration")
    return "\n".join(lines) + "\n"


def clusters(arguments: argparse.Namespace) -> int:
    return _shown(arguments, "/clusters?format=json", clusters_table)


def clusters_table(answer: Json, paint: Painter) -> str:
    rows: list[list[Cell]] = []
    for cluster in answer["cluster_statuses"]:
        if not cluster["host_statuses"]:
            rows.append([cluster["name"], "-", "-", "-", (_RED, "no endpoints"), *["-"] * 5])
        for host in cluster["host_statuses"]:
            counts = {stat["name"]: stat["value"] for stat in host["stats"]}
            health = host["health_status"]
            word: Cell = (_GREEN, "healthy")
            if health.get("failed_outlier_check"):
                word = (_RED, "ejected")
            elif health.get("failed_active_health_check"):
                word = (_RED, "unhealthy")
            locality = host["locality"]
            rows.append(
                [
                    cluster["name"],
                    _address(host["address"]),
                    "/".join(filter(None, (locality["region"], locality["zone"], locality["sub_zone"]))) or "-",
                    f"{host['priority']}",
                    word,
                    str(host["weight"]),
                    counts["rq_active"],
                    counts["rq_total"],
                    counts["rq_error"],
                    counts["cx_active"],
                ]
            )
    head = ("CLUSTER", "ENDPOINT", "LOCALITY", "PRIO", "HEALTH", "WEIGHT", "ACTIVE", "REQUESTS", "ERRORS", "CONNS")
    return table(head, rows, paint)


def routes(arguments: argparse.Namespace) -> int:
    return _shown(arguments, "/config_dump?resource=route_tables", routes_table)


def routes_table(answer: Json, paint: Painter) -> str:
    rows: list[list[Cell]] = []
    for config in answer["configs"]:
        for route_table in config.get("route_tables", {}).values():
            for host in route_table["virtual_hosts"]:
                rows += [
                    [
                        route_table["name"],
                        _some(host["domains"]),
                        route["name"],
                        _match(route["match"]),
                        _target(route),
                        route["source"] or "-",
                    ]
                    for route in host["routes"]
                ]
    return table(("TABLE", "DOMAINS", "ROUTE", "MATCH", "TO", "SOURCE"), rows, paint)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f", +{len(names) - 2}" if len(names) > 2 else "")


def _match(match: Mapping[str, Json]) -> str:
    conditions = [
        f"{name} {match[name]['kind']} {match[name]['value']}".rstrip()
        for name in ("path", "method", "authority", "scheme")
        if match[name] is not None
    ]
    for kind, label in (("headers", "header"), ("query", "query")):
        for one in match[kind]:
            prefix = "not " if one["is_inverted"] else ""
            conditions.append(f"{prefix}{label} {one['name']} {one['match']['kind']} {one['match']['value']}".rstrip())
    return " and ".join(conditions) or "*"


def _target(route: Mapping[str, Json]) -> str:
    if route["redirect"] is not None:
        redirect = route["redirect"]
        where = redirect["authority"] or redirect["path"] or redirect["prefix"] or redirect["scheme"] or ""
        return f"redirect {redirect['code']} {where}".rstrip()
    if route["direct_response"] is not None:
        return f"respond {route['direct_response']['status']}"
    if len(route["clusters"]) == 1:
        return str(route["clusters"][0]["cluster_key"])
    return ", ".join(f"{one['cluster_key']} {one['weight']}" for one in route["clusters"]) or "-"


def listeners(arguments: argparse.Namespace) -> int:
    return _shown(arguments, "/listeners?format=json", listeners_table)


def listeners_table(answer: Json, paint: Painter) -> str:
    rows: list[list[Cell]] = [
        [
            one["name"],
            _address(one["local_address"]),
            one["direction"],
            one["workload"],
            one["protocol"],
            one["tls"] or one["mtls"] if one["direction"] != "outbound" else "-",
            one["route_table"] or _some(one["tcp_clusters"]) or "-",
            one["source"] or "-",
        ]
        for one in answer["listener_statuses"]
    ]
    return table(("LISTENER", "ADDRESS", "DIRECTION", "WORKLOAD", "PROTOCOL", "TLS", "TO", "SOURCE"), rows, paint)


def certs(arguments: argparse.Namespace) -> int:
    return _shown(arguments, "/certs", certs_table)


def certs_table(answer: Json, paint: Painter) -> str:
    rows: list[list[Cell]] = []
    for item in answer["certificates"]:
        for kind, certificates in (("chain", item["cert_chain"]), ("root", item["ca_cert"])):
            for one in certificates:
                left_s = one["seconds_until_expiration"]
                colour = _RED if left_s <= 0 else _YELLOW if left_s < _WARN_BELOW_S else _GREEN
                names = [name for pair in one["subject_alt_names"] for name in pair.values()]
                rows.append(
                    [
                        item["workload"],
                        kind,
                        _some(names) or one["subject"] or "-",
                        one["serial_number"],
                        one["expiration_time"],
                        (colour, _duration(left_s) if left_s > 0 else "expired"),
                    ]
                )
    return table(("WORKLOAD", "KIND", "NAME", "SERIAL", "ENDS", "IN"), rows, paint)


def config(arguments: argparse.Namespace) -> int:
    path = "/config_dump"
    if arguments.resource:
        if not arguments.resource.replace("_", "").isalpha():
            raise ConfigError(f"--resource {arguments.resource!r} is not a name")
        path += f"?resource={arguments.resource}"
    return _shown(arguments, path, config_table)


def config_table(answer: Json, paint: Painter) -> str:
    """One line per object; the whole of them is what -o json is for."""
    rows: list[list[Cell]] = []
    for one in answer["configs"]:
        for kind in ("workloads", "listeners", "route_tables", "clusters", "peers"):
            for name, value in one.get(kind, {}).items():
                rows.append([kind.removesuffix("s").replace("_", " "), name, value.get("source") or "-"])
    version = next((one["version_info"] for one in answer["configs"] if "version_info" in one), "-")
    return f"snapshot {version}\n\n" + table(("KIND", "NAME", "SOURCE"), rows, paint)


def _address(address: Mapping[str, Json]) -> str:
    if "pipe" in address:
        return str(address["pipe"]["path"])
    host, port = address["socket_address"]["address"], address["socket_address"]["port_value"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / (1 << 20):.1f}"


def _duration(seconds: int) -> str:
    """The two largest units: `3d 4h`, `12m 5s`."""
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
