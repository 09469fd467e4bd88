"""Flags, environment and defaults → control.settings.Settings.

A flag wins over its MESHPROXY_… variable, that over what Kubernetes' downward API gives an Istio sidecar, that over
the default. A wrong value is a ConfigError of one sentence that names the flag or variable.
"""

import argparse
import ipaddress
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from meshproxy.control.log import LEVELS
from meshproxy.control.settings import Settings
from meshproxy.errors import ConfigError
from meshproxy.model.address import SocketAddress, is_ip
from meshproxy.model.endpoint import Locality

MAX_WORKERS = 256
LEAST_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    flag: str
    field: str
    metavar: str
    parse: Callable[[str], Any]
    """ValueError(text that continues `--flag `) where the value is wrong."""
    help: str
    fallback: str | None = None
    """The variable an Istio sidecar has for the same."""

    @property
    def variable(self) -> str:
        return "MESHPROXY_" + self.flag.removeprefix("--").replace("-", "_").upper()


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_WORKERS:
        raise ValueError(f"{text!r} is not a number from 1 to {MAX_WORKERS}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds") from None
    if not 0 <= seconds <= 86400:
        raise ValueError(f"{text!r} is not between 0 and 86400 seconds")
    return seconds


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _bytes(text: str) -> int:
    """A Kubernetes quantity: `128Mi`; `128MiB` and `128M` are understood as well."""
    digits = text.rstrip("KMGkmgiBb")
    factor = _UNITS.get(text[len(digits) :].lower().removesuffix("b"))
    if not digits.isdecimal() or factor is None:
        raise ValueError(f"{text!r} is not a size such as 128Mi")
    size = int(digits) * factor
    if 0 < size < LEAST_MEMORY_BYTES:
        raise ValueError(
            f"{text!r} is less than {LEAST_MEMORY_BYTES >> 20}Mi, which the processes take without any load"
        )
    return size


def _address(text: str) -> SocketAddress:
    """`HOST:PORT`, `[IPV6]:PORT` or `:PORT`; port 0 lets the system choose."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} needs brackets around its IPv6 address")
    if host == "localhost":
        host = "127.0.0.1"
    host = host or "0.0.0.0"
    if not colon or not port.isdecimal() or not int(port) <= 65535 or not is_ip(host):
        raise ValueError(f"{text!r} is not of the form IP:PORT")
    return SocketAddress(host, int(port))


def _loopback(text: str) -> SocketAddress:
    address = _address(text)
    if not ipaddress.ip_address(address.host).is_loopback:
        raise ValueError(f"{text!r} is not a loopback address: whoever reaches admin controls the proxy")
    return address


def _labels(text: str) -> dict[str, str]:
    labels = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{pair!r} is not of the form name=value")
        labels[name] = value
    return labels


def _level(text: str) -> str:
    if text.lower() not in LEVELS:
        raise ValueError(f"{text!r} is none of {', '.join(LEVELS)}")
    return text.lower()


def _encoding(text: str) -> str:
    if text.lower() not in ("text", "json"):
        raise ValueError(f"{text!r} is neither text nor json")
    return text.lower()


def _http3(text: str) -> bool:
    said = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}.get(text.lower())
    if said is None:
        raise ValueError(f"{text!r} is neither on nor off")
    if said and find_spec("aioquic") is None:
        raise ValueError("HTTP/3 needs aioquic, which is not installed: pip install 'meshproxy[http3]'")
    return said


def _name(text: str) -> str:
    if not text or any(character.isspace() or character == "/" for character in text):
        raise ValueError(f"{text!r} is not a name")
    return text


_SETTINGS = (
    _Setting(flag="--workers", field="workers", metavar="N", parse=_count, help="worker processes (1)"),
    _Setting(
        flag="--locality",
        field="locality",
        metavar="REGION/ZONE/SUBZONE",
        parse=Locality.parse,
        help="where this proxy runs (unknown)",
    ),
    _Setting(
        flag="--admin",
        field="admin",
        metavar="HOST:PORT",
        parse=_loopback,
        help="admin interface, loopback only (127.0.0.1:15000)",
    ),
    _Setting(
        flag="--metrics",
        field="metrics",
        metavar="HOST:PORT",
        parse=_address,
        help="Prometheus metrics (0.0.0.0:15020)",
    ),
    _Setting(flag="--ready", field="ready", metavar="HOST:PORT", parse=_address, help="/healthz/ready (0.0.0.0:15021)"),
    _Setting(
        flag="--certs",
        field="certificates_dir",
        metavar="DIR",
        parse=str,
        help="DIR/<namespace>/<service account>/{cert-chain,key,root-cert}.pem (no mesh identity)",
    ),
    _Setting(
        flag="--namespace",
        field="namespace",
        metavar="NAME",
        parse=_name,
        help="of resources that name none (default)",
        fallback="POD_NAMESPACE",
    ),
    _Setting(
        flag="--service-account",
        field="service_account",
        metavar="NAME",
        parse=_name,
        help="of this proxy's own workload (default)",
        fallback="SERVICE_ACCOUNT",
    ),
    _Setting(
        flag="--labels",
        field="labels",
        metavar="NAME=VALUE,…",
        parse=_labels,
        help="of this proxy's own workload, for selectors",
    ),
    _Setting(
        flag="--trust-domain",
        field="trust_domain",
        metavar="DOMAIN",
        parse=_name,
        help="of SPIFFE identities (cluster.local)",
        fallback="TRUST_DOMAIN",
    ),
    _Setting(
        flag="--root-namespace",
        field="root_namespace",
        metavar="NAME",
        parse=_name,
        help="whose policies hold for the whole mesh (istio-system)",
    ),
    _Setting(
        flag="--node-id",
        field="node_id",
        metavar="NAME",
        parse=str,
        help="names this proxy in what it reports",
        fallback="POD_NAME",
    ),
    _Setting(flag="--log-level", field="log_level", metavar="LEVEL", parse=_level, help=f"{', '.join(LEVELS)} (info)"),
    _Setting(
        flag="--access-log",
        field="access_log_file",
        metavar="FILE",
        parse=str,
        help="one line per request and connection, /dev/stdout or a file (none)",
    ),
    _Setting(
        flag="--access-log-encoding",
        field="access_log_encoding",
        metavar="ENCODING",
        parse=_encoding,
        help="text or json (text)",
    ),
    _Setting(
        flag="--access-log-format",
        field="access_log_format",
        metavar="FORMAT",
        parse=str,
        help="Envoy's command operators (Istio's format)",
    ),
    _Setting(
        flag="--drain-time",
        field="drain_time_s",
        metavar="SECONDS",
        parse=_seconds,
        help="how long SIGTERM waits for what is in flight (5)",
    ),
    _Setting(
        flag="--idle-timeout",
        field="idle_timeout_s",
        metavar="SECONDS",
        parse=_seconds,
        help="when a downstream connection on which nothing moves is closed, 0 for never (3600)",
    ),
    _Setting(
        flag="--http3",
        field="has_http3",
        metavar="on|off",
        parse=_http3,
        help="QUIC on the ports of HTTPS gateways and of inbound mTLS, beside TCP (off)",
        fallback="PILOT_ENABLE_QUIC_LISTENERS",
    ),
    _Setting(
        flag="--memory-limit",
        field="memory_limit_bytes",
        metavar="SIZE",
        parse=_bytes,
        help="of all processes together, before which load is shed, 0 for never (the control group's)",
    ),
    _Setting(
        flag="--ports-file",
        field="ports_file",
        metavar="FILE",
        parse=str,
        help="write the admin, metrics and ready ports there as JSON",
    ),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="PATH",
        help="a YAML file or a directory of them; repeatable; followed as they change [MESHPROXY_CONFIG, by colons]",
    )
    for setting in _SETTINGS:
        parser.add_argument(
            setting.flag, dest=setting.field, metavar=setting.metavar, help=f"{setting.help} [{setting.variable}]"
        )


def settings_from(flags: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Settings:
    """ConfigError where a value is wrong or no configuration is named."""
    paths = flags.config or [path for path in environment.get("MESHPROXY_CONFIG", "").split(":") if path]
    if not paths:
        raise ConfigError("no configuration: give -c PATH or set MESHPROXY_CONFIG")
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError(f"-c {path}: no such file or directory")
    values: dict[str, Any] = {}
    for setting in _SETTINGS:
        given = getattr(flags, setting.field)
        said_by = setting.flag
        if given is None:
            for variable in filter(None, (setting.variable, setting.fallback)):
                given = environment.get(variable) or None
                said_by = variable
                if given is not None:
                    break
        if given is None:
            continue
        try:
            values[setting.field] = setting.parse(given)
        except ValueError as error:
            raise ConfigError(f"{said_by}: {error}") from None
    return Settings(config_paths=tuple(paths), **values)
