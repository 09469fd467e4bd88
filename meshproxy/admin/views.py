"""What the admin interface shows: state → text or JSON-like values. Pure.

Decides: names and shapes, which are Envoy's wherever Envoy has them, with keys of ours added, never renamed.
Leaves to others: gathering the state (admin.server), metrics text (telemetry.exposition).
Source: Envoy docs/root/operations/admin.rst; envoy/admin/v3 *.proto for the JSON keys.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

from meshproxy.model.cluster import UNLIMITED, Cluster
from meshproxy.model.listener import Listener
from meshproxy.resources.problems import ConfigProblem
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.telemetry.exposition import Histogram, Statistics, families
from meshproxy.telemetry.process_state import CertificateInfo, ProcessState, ProcessUsage
from meshproxy.telemetry.recorder import DURATION_BOUNDS_MS

Json = Any
"""What json.dumps takes."""

_COUNTS = ("active_requests", "rq_total", "rq_success", "rq_error", "cx_active", "cx_total", "cx_connect_fail")


def jsonable(value: object) -> Json:
    """A model object as plain JSON values: dataclasses by field, enums by value, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: jsonable(getattr(value, one.name)) for one in fields(value) if one.repr}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    return value


# ── clusters ──


def merge_clusters(answers: Iterable[Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The workers' answers to Ask("clusters") as one, in the order of the names.

    Counts add up. An endpoint that one worker holds for ejected or unhealthy is shown so: a verdict reaches the workers
    within milliseconds of each other.
    """
    clusters: dict[str, dict[str, Any]] = {}
    endpoints: dict[tuple[str, str, int], dict[str, Any]] = {}
    for answer in answers:
        for cluster in answer:
            key = cluster["cluster_key"]
            merged = clusters.setdefault(
                key, {"cluster_key": key, "cluster_name": cluster["cluster_name"], "endpoints": []}
            )
            for endpoint in cluster["endpoints"]:
                place = (key, endpoint["address"], endpoint["port"])
                had = endpoints.get(place)
                if had is None:
                    endpoints[place] = had = dict(endpoint) | {"locality": str(endpoint["locality"])}
                    merged["endpoints"].append(had)
                    continue
                for name in _COUNTS:
                    had[name] += endpoint[name]
                had["is_ejected"] = had["is_ejected"] or endpoint["is_ejected"]
                had["is_unhealthy"] = had["is_unhealthy"] or endpoint["is_unhealthy"]
    return sorted(clusters.values(), key=lambda cluster: (cluster["cluster_name"], cluster["cluster_key"]))


def _where(endpoint: Mapping[str, Any]) -> str:
    address, port = endpoint["address"], endpoint["port"]
    if address.startswith("/"):
        return str(address)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _locality_parts(locality: str) -> tuple[str, str, str]:
    region, zone, subzone = (*locality.split("/", 2), "", "")[:3]
    return region, zone, subzone


def clusters_text(clusters: Sequence[Mapping[str, Any]], snapshot: Snapshot) -> Iterator[str]:
    """One piece per cluster, in Envoy's `name::address::key::value` lines."""
    for cluster in clusters:
        name = cluster["cluster_name"]
        lines = [f"{name}::observability_name::{name}"]
        known = snapshot.clusters.get(cluster["cluster_key"])
        if known is not None:
            lines += _limit_lines(name, known)
        for endpoint in cluster["endpoints"]:
            flags = "".join(
                flag
                for flag, is_set in (
                    ("/failed_active_hc", endpoint["is_unhealthy"]),
                    ("/failed_outlier_check", endpoint["is_ejected"]),
                )
                if is_set
            )
            region, zone, subzone = _locality_parts(endpoint["locality"])
            prefix = f"{name}::{_where(endpoint)}::"
            lines += [
                f"{prefix}cx_active::{endpoint['cx_active']}",
                f"{prefix}cx_connect_fail::{endpoint['cx_connect_fail']}",
                f"{prefix}cx_total::{endpoint['cx_total']}",
                f"{prefix}rq_active::{endpoint['active_requests']}",
                f"{prefix}rq_error::{endpoint['rq_error']}",
                f"{prefix}rq_success::{endpoint['rq_success']}",
                f"{prefix}rq_total::{endpoint['rq_total']}",
                f"{prefix}health_flags::{flags or 'healthy'}",
                f"{prefix}weight::{endpoint['weight']}",
                f"{prefix}region::{region}",
                f"{prefix}zone::{zone}",
                f"{prefix}sub_zone::{subzone}",
                f"{prefix}priority::{endpoint['priority']}",
            ]
        yield "\n".join(lines) + "\n"


def _limit_lines(name: str, cluster: Cluster) -> list[str]:
    limits = cluster.limits
    prefix = f"{name}::default_priority::"
    return [
        f"{prefix}max_connections::{limits.max_connections}",
        f"{prefix}max_pending_requests::{limits.max_pending_requests}",
        f"{prefix}max_requests::{limits.max_requests}",
        f"{prefix}max_retries::{limits.max_retries}",
    ]


def cluster_statuses(clusters: Sequence[Mapping[str, Any]], snapshot: Snapshot) -> Iterator[Json]:
    """Items of `cluster_statuses` (envoy.admin.v3.ClusterStatus); counts are strings, as in proto3 JSON."""
    for cluster in clusters:
        status: dict[str, Json] = {
            "name": cluster["cluster_name"],
            "added_via_api": True,
            "cluster_key": cluster["cluster_key"],
            "host_statuses": [_host_status(endpoint) for endpoint in cluster["endpoints"]],
        }
        known = snapshot.clusters.get(cluster["cluster_key"])
        if known is not None:
            status["circuit_breakers"] = {
                "thresholds": [
                    {
                        key: value
                        for key, value in (
                            ("max_connections", known.limits.max_connections),
                            ("max_pending_requests", known.limits.max_pending_requests),
                            ("max_requests", known.limits.max_requests),
                            ("max_retries", known.limits.max_retries),
                        )
                        if value != UNLIMITED
                    }
                ]
            }
            status["lb_policy"] = known.lb.kind.value
            status["source"] = known.source
        yield status


def _host_status(endpoint: Mapping[str, Any]) -> Json:
    address = endpoint["address"]
    health: dict[str, Json] = {"eds_health_status": "HEALTHY"}
    if endpoint["is_ejected"]:
        health["failed_outlier_check"] = True
    if endpoint["is_unhealthy"]:
        health["failed_active_health_check"] = True
    region, zone, subzone = _locality_parts(endpoint["locality"])
    return {
        "address": {"pipe": {"path": address}}
        if address.startswith("/")
        else {"socket_address": {"address": address, "port_value": endpoint["port"]}},
        "stats": [
            {"name": "cx_connect_fail", "value": str(endpoint["cx_connect_fail"])},
            {"name": "cx_total", "value": str(endpoint["cx_total"])},
            {"name": "rq_error", "value": str(endpoint["rq_error"])},
            {"name": "rq_success", "value": str(endpoint["rq_success"])},
            {"name": "rq_total", "value": str(endpoint["rq_total"])},
            {"type": "GAUGE", "name": "cx_active", "value": str(endpoint["cx_active"])},
            {"type": "GAUGE", "name": "rq_active", "value": str(endpoint["active_requests"])},
        ],
        "health_status": health,
        "weight": endpoint["weight"],
        "locality": {"region": region, "zone": zone, "sub_zone": subzone},
        "priority": endpoint["priority"],
    }


# ── listeners ──


def _listener_address(listener: Listener) -> Json:
    if listener.address.startswith("/"):
        return {"pipe": {"path": listener.address}}
    return {"socket_address": {"address": listener.address, "port_value": listener.port}}


def listeners_text(snapshot: Snapshot) -> str:
    """Envoy's `name::address` lines."""
    return "".join(
        f"{listener.name}::{_where({'address': listener.address, 'port': listener.port})}\n"
        for listener in snapshot.listeners.values()
    )


def listener_statuses(snapshot: Snapshot) -> Iterator[Json]:
    """Items of `listener_statuses` (envoy.admin.v3.ListenerStatus), with what the listener is for."""
    for listener in snapshot.listeners.values():
        yield {
            "name": listener.name,
            "local_address": _listener_address(listener),
            "direction": listener.direction.value,
            "workload": listener.workload_id,
            "protocol": listener.protocol.value,
            "mtls": listener.mtls.value,
            "tls": None if listener.tls is None else listener.tls.mode.value,
            "route_table": listener.route_table,
            "tcp_clusters": [cluster.cluster_key for route in listener.tcp_routes for cluster in route.clusters],
            "source": listener.source,
        }


# ── certificates ──


def utc(seconds: float) -> str:
    """RFC 3339, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def certificates(infos: Iterable[CertificateInfo], now: float) -> Json:
    """envoy.admin.v3.Certificates: one item per workload, its roots and its chain."""
    items: dict[str, dict[str, Json]] = {}
    for info in infos:
        item = items.setdefault(info.workload_id, {"workload": info.workload_id, "ca_cert": [], "cert_chain": []})
        item["ca_cert" if info.kind == "ca_cert" else "cert_chain"].append(
            {
                "path": info.path,
                "serial_number": info.serial_number,
                "subject_alt_names": [{"uri": uri} for uri in info.uris] + [{"dns": name} for name in info.dns_names],
                "subject": info.subject,
                "days_until_expiration": str(max(0, int((info.not_after - now) // 86400))),
                "valid_from": utc(info.not_before),
                "expiration_time": utc(info.not_after),
                "seconds_until_expiration": int(info.not_after - now),
            }
        )
    return {"certificates": list(items.values())}


# ── configuration ──

RESOURCES = ("workloads", "listeners", "route_tables", "clusters", "peers")


def config_dump(snapshot: Snapshot, now: float, resource: str | None = None) -> Iterator[str]:
    """JSON text in pieces, one object of the snapshot each. resource: only that one of RESOURCES."""
    yield '{"configs":['
    is_first = True
    for name in RESOURCES:
        if resource is not None and resource != name:
            continue
        kind = name.replace("_", " ").title().replace(" ", "")
        head = {"@type": f"meshproxy.{kind}ConfigDump", "version_info": snapshot.version, "last_updated": utc(now)}
        yield ("" if is_first else ",") + json.dumps(head)[:-1] + f', "{name}":{{'
        is_first = False
        separator = "\n"
        for key, value in getattr(snapshot, name).items():
            yield f"{separator}{json.dumps(key)}:{json.dumps(jsonable(value))}"
            separator = ",\n"
        yield "}}"
    if resource is None:
        log = {"@type": "meshproxy.AccessLogConfigDump", "access_log": jsonable(snapshot.access_log)}
        yield f",{json.dumps(log)}"
    yield "]}\n"


def problems(found: Iterable[ConfigProblem]) -> Json:
    return {"problems": [jsonable(problem) | {"sentence": problem.sentence()} for problem in found]}


# ── process ──


def server_info(process: ProcessState, version: str, log_level: str, options: Mapping[str, Json]) -> Json:
    """envoy.admin.v3.ServerInfo, with the workers and the snapshot. options: the process's settings."""
    uptime = f"{int(process.now - process.started_at)}s"
    return {
        "version": version,
        "state": process.state,
        "hot_restart_version": "disabled",
        "command_line_options": dict(options),
        "node": {"id": options.get("node_id", ""), "locality": options.get("locality", "")},
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "log_level": log_level,
        "snapshot": {
            "version": process.snapshot.version,
            "published_at": utc(process.counters.published_at) if process.counters.published_at else None,
            "workloads": len(process.snapshot.workloads),
            "listeners": len(process.snapshot.listeners),
            "route_tables": len(process.snapshot.route_tables),
            "clusters": len(process.snapshot.clusters),
            "endpoints": sum(process.cluster_sizes.values()),
        },
        "workers": [
            {
                "slot": worker.slot,
                "pid": worker.pid,
                "started_at": utc(worker.started_at),
                "snapshot_version": worker.version,
                "is_current": worker.version == process.snapshot.version,
                "is_draining": worker.is_draining,
                "apply_stall_s": worker.apply_stall_s,
                "apply_total_s": worker.apply_total_s,
                "problems": list(worker.problems),
            }
            for worker in process.workers
        ],
        "worker_restarts": process.counters.worker_restarts,
        "problems": {"warnings": process.warnings, "errors": process.errors},
    }


def memory(usages: Iterable[tuple[str, int, ProcessUsage]]) -> Json:
    """(name, pid, usage) of each process. `allocated` is Envoy's key for the whole: here the sum of PSS."""
    processes = [{"name": name, "pid": pid} | jsonable(usage) for name, pid, usage in usages]
    total = sum(one["pss_bytes"] if one["pss_bytes"] is not None else one["resident_bytes"] for one in processes)
    return {"allocated": str(total), "processes": processes}


# ── statistics ──

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)


def quantile(counts: Sequence[int], q: float) -> float | None:
    """The q-quantile of a histogram, linear within a bucket; None where nothing was counted.

    What lies beyond the last bound counts as the last bound.
    """
    cumulative = list(accumulate(counts))
    if not cumulative or not cumulative[-1]:
        return None
    rank = q * cumulative[-1]
    at = next(i for i, total in enumerate(cumulative) if total >= rank and counts[i])
    if at >= len(DURATION_BOUNDS_MS):
        return DURATION_BOUNDS_MS[-1]
    low = DURATION_BOUNDS_MS[at - 1] if at else 0.0
    before = cumulative[at - 1] if at else 0
    return low + (DURATION_BOUNDS_MS[at] - low) * max(0.0, rank - before) / counts[at]


Stat = tuple[str, float | Histogram]


def stats(
    statistics: Statistics, process: ProcessState, *, pattern: re.Pattern[str] | None = None, used_only: bool = False
) -> Iterator[Stat]:
    """Name and value of every statistic, under Envoy's dotted names where there are such.

    pattern: only names in which it is found. used_only: only what has been counted at least once.
    """
    for name, value in _all_stats(statistics, process):
        if used_only and not (any(value.counts) if isinstance(value, Histogram) else value):
            continue
        if pattern is None or pattern.search(name):
            yield name, value


def _all_stats(statistics: Statistics, process: ProcessState) -> Iterator[Stat]:
    for name, values in statistics.cluster_values().items():
        for field, count in values.items():
            yield f"cluster.{name}.{_dotted(field)}", count
    for name, values in statistics.listener_values().items():
        for field, count in values.items():
            kind = "http" if field.startswith("downstream_rq_") else "listener"
            yield f"{kind}.{name}.{_dotted(field)}", count
    for metric, samples in families(statistics, process):
        if metric.name.startswith(("envoy_cluster_upstream", "envoy_listener_", "envoy_http_")):
            continue  # said above
        for labels, value in samples:
            pairs = ",".join(f"{name}={text}" for name, text in zip(metric.labels, labels, strict=True))
            if metric.name.startswith("envoy_server_"):
                yield metric.name.replace("envoy_server_", "server."), value
            else:
                yield f"{metric.name}{{{pairs}}}" if pairs else metric.name, value


def _dotted(field: str) -> str:
    return field.replace("ssl_", "ssl.", 1) if field.startswith("ssl_") else field


def stats_text(found: Iterable[Stat]) -> Iterator[str]:
    for name, value in found:
        if isinstance(value, Histogram):
            counts = list(value.counts)
            shown = " ".join(f"P{q * 100:g}(nan,{_short(quantile(counts, q))})" for q in _QUANTILES)
            yield f"{name}: {shown if any(counts) else 'No recorded values'}\n"
        else:
            yield f"{name}: {_short(value)}\n"


def stats_json(found: Iterable[Stat]) -> Iterator[str]:
    """JSON text in pieces: `{"stats":[{"name":…,"value":…},…,{"histograms":…}]}`."""
    histograms = []
    yield '{"stats":['
    separator = "\n"
    for name, value in found:
        if isinstance(value, Histogram):
            counts = list(value.counts)
            values = [{"cumulative": quantile(counts, q), "interval": None} for q in _QUANTILES]
            histograms.append({"name": name, "values": values})
        else:
            yield separator + json.dumps({"name": name, "value": value})
            separator = ",\n"
    quantiles = [round(q * 100, 1) for q in _QUANTILES]
    tail = {"histograms": {"supported_quantiles": quantiles, "computed_quantiles": histograms}}
    yield separator + json.dumps(tail) + "]}\n"


def _short(value: float | None) -> str:
    if value is None:
        return "nan"
    return str(value) if isinstance(value, int) else f"{value:.6g}" if abs(value) < 1e6 else f"{value:.3f}"
