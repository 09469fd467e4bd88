import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from meshproxy.cli.main import main
from meshproxy.cli.settings import add_flags, settings_from
from meshproxy.control.settings import Settings
from meshproxy.errors import ConfigError
from meshproxy.model.address import SocketAddress
from meshproxy.model.endpoint import Locality


def settings(*flags: str, **environment: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    variables: Mapping[str, str] = {"MESHPROXY_CONFIG": "/", **environment}
    return settings_from(parser.parse_args(flags), variables)


def test_defaults_are_istios_ports_and_one_worker() -> None:
    defaults = settings()
    assert (str(defaults.admin), str(defaults.metrics), str(defaults.ready)) == (
        "127.0.0.1:15000",
        "0.0.0.0:15020",
        "0.0.0.0:15021",
    )
    assert defaults.workers == 1
    assert defaults.drain_time_s == 5.0
    assert defaults.idle_timeout_s == 3600.0
    assert defaults.config_paths == ("/",)


def test_a_flag_wins_over_its_variable_and_that_over_the_downward_api() -> None:
    assert settings(POD_NAMESPACE="pod").namespace == "pod"
    assert settings(POD_NAMESPACE="pod", MESHPROXY_NAMESPACE="variable").namespace == "variable"
    assert settings("--namespace", "flag", MESHPROXY_NAMESPACE="variable").namespace == "flag"


def test_every_flag_has_a_variable() -> None:
    given = settings(
        MESHPROXY_WORKERS="2",
        MESHPROXY_LOCALITY="cn-north-1/zone1/rack",
        MESHPROXY_ADMIN="localhost:0",
        MESHPROXY_METRICS=":15",
        MESHPROXY_READY="[::1]:16",
        MESHPROXY_CERTS="/certs",
        MESHPROXY_SERVICE_ACCOUNT="rsu",
        MESHPROXY_LABELS="app=rsu, version=v1",
        MESHPROXY_TRUST_DOMAIN="td",
        MESHPROXY_NODE_ID="node",
        MESHPROXY_LOG_LEVEL="DEBUG",
        MESHPROXY_DRAIN_TIME="2.5s",
        MESHPROXY_IDLE_TIMEOUT="60",
        MESHPROXY_ACCESS_LOG="/dev/stdout",
        MESHPROXY_ACCESS_LOG_ENCODING="JSON",
        MESHPROXY_ACCESS_LOG_FORMAT="%PROTOCOL%",
        MESHPROXY_MEMORY_LIMIT="96Mi",
        MESHPROXY_PORTS_FILE="/tmp/ports",
    )
    assert given == Settings(
        config_paths=("/",),
        workers=2,
        locality=Locality("cn-north-1", "zone1", "rack"),
        admin=SocketAddress("127.0.0.1", 0),
        metrics=SocketAddress("0.0.0.0", 15),
        ready=SocketAddress("::1", 16),
        certificates_dir="/certs",
        service_account="rsu",
        labels={"app": "rsu", "version": "v1"},
        trust_domain="td",
        node_id="node",
        log_level="debug",
        drain_time_s=2.5,
        idle_timeout_s=60.0,
        access_log_file="/dev/stdout",
        access_log_encoding="json",
        access_log_format="%PROTOCOL%",
        memory_limit_bytes=96 << 20,
        ports_file="/tmp/ports",
    )


def test_configuration_paths_add_up_and_may_come_from_the_environment(tmp_path: Path) -> None:
    assert settings("-c", "/", "-c", str(tmp_path)).config_paths == ("/", str(tmp_path))
    assert settings(MESHPROXY_CONFIG=f"/:{tmp_path}").config_paths == ("/", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workers", "0"], "--workers: '0' is not a number from 1 to 256"),
        (["--workers", "many"], "--workers: 'many' is not a number from 1 to 256"),
        (["--locality", "a/b/c/d"], "--locality: locality 'a/b/c/d' has more than three parts"),
        (
            ["--admin", "0.0.0.0:15000"],
            "--admin: '0.0.0.0:15000' is not a loopback address: whoever reaches admin controls the proxy",
        ),
        (["--metrics", "15020"], "--metrics: '15020' is not of the form IP:PORT"),
        (["--metrics", "host:15020"], "--metrics: 'host:15020' is not of the form IP:PORT"),
        (["--metrics", "0.0.0.0:70000"], "--metrics: '0.0.0.0:70000' is not of the form IP:PORT"),
        (["--ready", "::1:15021"], "--ready: '::1:15021' needs brackets around its IPv6 address"),
        (["--labels", "app"], "--labels: 'app' is not of the form name=value"),
        (["--log-level", "loud"], "--log-level: 'loud' is none of debug, info, warning, error"),
        (["--access-log-encoding", "xml"], "--access-log-encoding: 'xml' is neither text nor json"),
        (["--memory-limit", "much"], "--memory-limit: 'much' is not a size such as 128Mi"),
        (["--memory-limit", "1.5Gi"], "--memory-limit: '1.5Gi' is not a size such as 128Mi"),
        (
            ["--memory-limit", "8Mi"],
            "--memory-limit: '8Mi' is less than 64Mi, which the processes take without any load",
        ),
        (["--drain-time", "soon"], "--drain-time: 'soon' is not a number of seconds"),
        (["--drain-time", "nan"], "--drain-time: 'nan' is not between 0 and 86400 seconds"),
        (["--namespace", "a/b"], "--namespace: 'a/b' is not a name"),
        (["-c", "/no/such/path"], "-c /no/such/path: no such file or directory"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_flag(flags: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(*flags)
    assert str(raised.value) == sentence


def test_a_wrong_variable_is_named_as_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"^MESHPROXY_WORKERS: "):
        settings(MESHPROXY_WORKERS="-1")


def test_no_configuration_is_one_sentence_and_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MESHPROXY_CONFIG", raising=False)
    assert main(["run"]) == 1
    assert capsys.readouterr().err == "meshproxy: no configuration: give -c PATH or set MESHPROXY_CONFIG\n"


@pytest.mark.parametrize(
    ("said", "meant"), [("on", True), ("true", True), ("1", True), ("off", False), ("False", False), ("0", False)]
)
def test_http3_is_off_unless_asked_for(said: str, meant: bool) -> None:
    assert not settings().has_http3
    assert settings("--http3", said).has_http3 is meant
    assert settings(PILOT_ENABLE_QUIC_LISTENERS=said).has_http3 is meant
    with pytest.raises(ConfigError, match="--http3: 'maybe' is neither on nor off"):
        settings("--http3", "maybe")


def test_http3_without_its_library_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aioquic", None)
    with pytest.raises(ConfigError, match="HTTP/3 needs aioquic, which is not installed"):
        settings("--http3", "on")
