from meshproxy.telemetry import metrics
from meshproxy.telemetry.metrics import ALL, Metric
from meshproxy.telemetry.recorder import CLUSTER_FIELDS, LISTENER_FIELDS


def test_every_metric_is_declared_once() -> None:
    names = [metric.name for metric in ALL]
    assert len(names) == len(set(names))
    declared = {value.name for value in vars(metrics).values() if isinstance(value, Metric)}
    assert declared <= set(names)


def test_every_field_workers_count_has_a_metric() -> None:
    for fields, declared in ((CLUSTER_FIELDS, metrics.CLUSTER_METRICS), (LISTENER_FIELDS, metrics.LISTENER_METRICS)):
        assert [field for field in fields if metrics.code_class(field) is None] == list(declared)


def test_every_metric_says_what_it_is() -> None:
    assert all((metric.help.endswith(".") and metric.help[0].isupper()) or metric.help[0].isdigit() for metric in ALL)
