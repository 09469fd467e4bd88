"""Syntax of the names and addresses that fields hold. Each check says what is wrong, or None.

Source: RFC 1123 labels as Kubernetes and Istio's validation read them; RFC 9110 §5.1 for header names.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import Final

_LABEL = re.compile(r"[a-zA-Z0-9](?:[-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?")
_WILDCARD_LABEL = re.compile(r"\*|(?:\*|[a-zA-Z0-9])(?:[-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?")
_LOWER_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"(?:(?P<prefix>[a-z0-9][-a-z0-9.]{0,252})/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")

PROTOCOLS: Final = frozenset(
    {"HTTP", "HTTP2", "HTTP_PROXY", "GRPC", "GRPC-WEB", "HTTPS", "TLS", "TCP", "UDP", "MONGO", "REDIS", "MYSQL"}
)
HTTP_PROTOCOLS: Final = frozenset({"HTTP", "HTTP2", "HTTP_PROXY", "GRPC", "GRPC-WEB"})
TLS_PROTOCOLS: Final = frozenset({"HTTPS", "TLS"})


def _quoted(text: str) -> str:
    return f'"{text[:80]}…"' if len(text) > 80 else f'"{text}"'


def dns_label(text: str) -> str | None:
    return None if _LOWER_LABEL.fullmatch(text) else f"{_quoted(text)} is not a DNS label (a-z, 0-9, -; at most 63)"


def object_name(text: str) -> str | None:
    """metadata.name: dot-separated DNS labels, at most 253."""
    if len(text) <= 253 and all(_LOWER_LABEL.fullmatch(part) for part in text.split(".")):
        return None
    return f"{_quoted(text)} is not a name (a-z, 0-9, - and .; at most 253)"


def host(text: str) -> str | None:
    """A host name; the first label may be `*` or begin with it."""
    first, _, rest = text.partition(".")
    if not _WILDCARD_LABEL.fullmatch(first):
        return f"{_quoted(text)} is not a host name (label {_quoted(first)})"
    return _labels(text, rest) if rest or "." in text else _length(text)


def exact_host(text: str) -> str | None:
    if "*" in text:
        return f"{_quoted(text)} has a wildcard, which is not allowed here"
    return host(text)


def host_not_all(text: str) -> str | None:
    return "host * is not allowed here" if text == "*" else host(text)


def host_or_ip(text: str) -> str | None:
    return None if is_ip(text) else host(text)


def exact_host_or_ip(text: str) -> str | None:
    return None if is_ip(text) else exact_host(text)


def _labels(whole: str, rest: str) -> str | None:
    labels = rest.split(".")
    if labels[-1] == "":
        labels.pop()  # fully qualified with a final dot
    for label in labels:
        if not _LABEL.fullmatch(label):
            return f"{_quoted(whole)} is not a host name (label {_quoted(label)})"
    if labels and labels[-1].isdecimal():
        return f"{_quoted(whole)} is not a host name (its last label is a number)"
    return _length(whole)


def _length(text: str) -> str | None:
    return None if len(text) <= 255 else f"{_quoted(text)} is longer than 255 characters"


def scoped_host(text: str) -> str | None:
    """Sidecar egress: `namespace/host`, either part may be `*`; the namespace may be `.` or, excluded, begin with ~."""
    namespace, slash, name = text.partition("/")
    if not slash:
        name = text[:80]
        return f"{_quoted(text)} is not namespace/host: write */{name} for any namespace or ./{name} for this one"
    bare = namespace.removeprefix("~")
    if namespace != "~" and bare not in ("*", ".") and not _LOWER_LABEL.fullmatch(bare):
        return f"{_quoted(text)} has no namespace, *, . or ~ before the slash"
    return _scoped_name(text, name)


def gateway_host(text: str) -> str | None:
    """Gateway servers: a host, `namespace/host`, `*/host` or `./host`."""
    namespace, slash, name = text.rpartition("/")
    if slash and namespace not in ("*", ".") and not _LOWER_LABEL.fullmatch(namespace):
        return f"{_quoted(text)} has no namespace, * or . before the slash"
    return None if is_ip(name) else _scoped_name(text, name)


def _scoped_name(text: str, name: str) -> str | None:
    if name == "*":
        return None
    if "." not in name:
        whole = f"{name[:60] or 'name'}.default.svc.cluster.local"
        return f"{_quoted(text)} is a short name; write the whole host name, such as {whole}"
    if "*" in name and not name.startswith("*."):
        return f"{_quoted(text)} has a wildcard inside a label; only *. at the front is allowed"
    return host(name)


def gateway_name(text: str) -> str | None:
    """VirtualService gateways: `mesh`, a name, or `namespace/name`."""
    namespace, slash, name = text.rpartition("/")
    if (slash and not _LOWER_LABEL.fullmatch(namespace)) or object_name(name) is not None:
        return f"{_quoted(text)} is not a gateway: write mesh, a name, or namespace/name"
    return None


def export_target(text: str) -> str | None:
    if text in (".", "*", "~") or _LOWER_LABEL.fullmatch(text):
        return None
    return f"{_quoted(text)} is neither . nor * nor a namespace"


_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?!$)|$)){4}")


def is_ip(text: str) -> bool:
    if _IPV4.fullmatch(text):  # a tenth of ipaddress's time, ten thousand times a reload
        return True
    if not text or text[0] not in "0123456789abcdefABCDEF:":
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def ip(text: str) -> str | None:
    return None if is_ip(text) else f"{_quoted(text)} is not an IP address"


def bind_address(text: str) -> str | None:
    """An IP address, or `unix://` and a path."""
    if text.startswith("unix://"):
        return unix_path(text.removeprefix("unix://"))
    return None if is_ip(text) else f"{_quoted(text)} is neither an IP address nor unix:///path"


def unix_path(text: str) -> str | None:
    if not text.startswith(("/", "@")) or text.endswith("/") or len(text.encode()) > 107:
        return f"{_quoted(text)} is not an absolute path of a unix socket (at most 107 bytes)"
    return None


def subnet(text: str) -> str | None:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return f"{_quoted(text)} is neither an IP address nor a network such as 10.0.0.0/8"
    return None


def workload_address(text: str) -> str | None:
    """WorkloadEntry address: IP, host name or `unix://` path."""
    if text.startswith("unix://"):
        return unix_path(text.removeprefix("unix://"))
    if exact_host_or_ip(text) is not None:
        return f"{_quoted(text)} is neither an IP address, a host name nor unix:///path"
    return None


def local_endpoint(text: str) -> str | None:
    """Sidecar ingress defaultEndpoint: a port of this host, `127.0.0.1:port` and its like, or a unix socket."""
    if text.startswith("unix://"):
        return unix_path(text.removeprefix("unix://"))
    address, colon, port = text.rpartition(":")
    if not colon or address not in ("", "127.0.0.1", "0.0.0.0", "[::1]", "[::]"):
        return f"{_quoted(text)} is none of 127.0.0.1:port, 0.0.0.0:port, [::1]:port, [::]:port, :port and unix:///path"
    if not port.isascii() or not port.isdecimal() or not 1 <= int(port[:6]) <= 65535:
        return f"{_quoted(text)} has no port in 1..65535"
    return None


def protocol(text: str) -> str | None:
    if text.upper() in PROTOCOLS:
        return None
    return f"{_quoted(text)} is not a protocol ({', '.join(sorted(PROTOCOLS))})"


def label_key(text: str) -> str | None:
    return None if _LABEL_KEY.fullmatch(text) else f"{_quoted(text)} is not a label key"


def label_value(text: str) -> str | None:
    return (
        None
        if _LABEL_VALUE.fullmatch(text)
        else f"{_quoted(text)} is not a label value (A-Z, a-z, 0-9, -, _, .; at most 63)"
    )


def selector_value(text: str) -> str | None:
    return "a selector takes no wildcard" if "*" in text else label_value(text)


def port_key(text: str) -> str | None:
    if text.isascii() and text.isdecimal() and 1 <= int(text[:6]) <= 65535 and text[0] != "0":
        return None
    return f"{_quoted(text)} is not a port in 1..65535"


def header_name(text: str) -> str | None:
    return None if _TOKEN.fullmatch(text) else f"{_quoted(text)} is not a header name"


def probe_header_name(text: str) -> str | None:
    """Kubernetes takes fewer characters than HTTP."""
    if text.replace("-", "").replace("_", "").isalnum() and text.isascii():
        return None
    return f"{_quoted(text)} is not a header name of a probe (A-Z, a-z, 0-9, - and _)"


_PSEUDO_HEADERS: Final = frozenset({":method", ":scheme", ":authority", ":path"})


def matched_header(text: str) -> str | None:
    """A header a route looks at; HTTP/2's names of the request line are allowed."""
    if text.startswith("@request.auth."):
        return f"{_quoted(text)} needs RequestAuthentication, which this version does not serve"
    return None if text in _PSEUDO_HEADERS else header_name(text)


def request_header(text: str) -> str | None:
    """A header a route sets or adds; `:authority` and `host` rewrite the authority."""
    return None if text == ":authority" else header_name(text)


def changed_header(text: str) -> str | None:
    """A header a route removes, or changes in a response."""
    if text.startswith(":") or text.lower() == "host":
        return f"{_quoted(text)} cannot be changed"
    return header_name(text)


def header_value(text: str) -> str | None:
    return None if _HEADER_VALUE.fullmatch(text) else "the header value has control characters"


def as_table_key(check: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """The check, and a word for the empty key."""
    return lambda text: check(text) if text else "the key is empty"
