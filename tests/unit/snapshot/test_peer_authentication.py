import pytest

from meshproxy.model.listener import MtlsMode
from meshproxy.resources.load import load_text
from meshproxy.snapshot.findings import Findings, age_order
from meshproxy.snapshot.peer_authentication import PeerAuthentications

RSU = {"app": "rsu-service"}


def policy(name: str, namespace: str, mode: str = "", selector: str = "", port: str = "", created: str = "") -> str:
    lines = [
        "---",
        "apiVersion: security.istio.io/v1",
        "kind: PeerAuthentication",
        f"metadata: {{name: {name}, namespace: {namespace}{f', creationTimestamp: {created}' if created else ''}}}",
        "spec:",
        f"  mtls: {{mode: {mode or 'UNSET'}}}",
    ]
    if selector:
        lines.append(f"  selector: {{matchLabels: {{app: {selector}}}}}")
    if port:
        lines.append(f"  portLevelMtls: {{8080: {{mode: {port}}}}}")
    return "\n".join(lines)


def authentications(*texts: str) -> tuple[PeerAuthentications, Findings]:
    resources, problems = load_text("\n".join(texts), "mesh.yaml")
    assert not problems
    findings = Findings()
    return PeerAuthentications(sorted(resources, key=age_order), "istio-system", findings), findings


@pytest.mark.parametrize(
    ("mesh", "namespace", "workload", "port", "on_port", "elsewhere"),
    [
        (None, None, None, None, "PERMISSIVE", "PERMISSIVE"),
        ("STRICT", None, None, None, "STRICT", "STRICT"),
        ("STRICT", "PERMISSIVE", None, None, "PERMISSIVE", "PERMISSIVE"),
        ("STRICT", "UNSET", None, None, "STRICT", "STRICT"),
        ("UNSET", None, None, None, "PERMISSIVE", "PERMISSIVE"),
        (None, "STRICT", "UNSET", "DISABLE", "DISABLE", "STRICT"),
        (None, None, "STRICT", "UNSET", "STRICT", "STRICT"),
        ("STRICT", "STRICT", "DISABLE", None, "DISABLE", "DISABLE"),
        (None, None, "STRICT", None, "STRICT", "STRICT"),
    ],
)
def test_each_scope_overrides_the_one_around_it_and_unset_inherits(
    mesh: str | None, namespace: str | None, workload: str | None, port: str | None, on_port: str, elsewhere: str
) -> None:
    texts = []
    if mesh is not None:
        texts.append(policy("mesh", "istio-system", mesh))
    if namespace is not None:
        texts.append(policy("namespace", "default", namespace))
    if workload is not None:
        texts.append(policy("workload", "default", workload, "rsu-service", port or ""))
    policies, _ = authentications(*texts)
    assert policies.mode("default", RSU, 8080) is MtlsMode(on_port)
    assert policies.mode("default", RSU, 9090) is MtlsMode(elsewhere)


def test_a_selector_leaves_other_workloads_and_namespaces_alone() -> None:
    policies, _ = authentications(policy("v2x", "default", "STRICT", "rsu-service"))
    assert policies.mode("default", {"app": "other"}, 8080) is MtlsMode.PERMISSIVE
    assert policies.mode("other", RSU, 8080) is MtlsMode.PERMISSIVE


def test_of_several_in_one_scope_the_oldest_wins_and_the_others_are_named() -> None:
    policies, findings = authentications(
        policy("young", "default", "DISABLE", created='"2026-02-01T00:00:00Z"'),
        policy("old", "default", "STRICT", created='"2026-01-01T00:00:00Z"'),
    )
    assert policies.mode("default", RSU, 8080) is MtlsMode.STRICT
    (problem,) = findings.all()
    assert "PeerAuthentication default/young" in problem.sentence()
    assert "PeerAuthentication old" in problem.sentence()


def test_of_several_that_select_a_workload_the_oldest_wins() -> None:
    policies, findings = authentications(
        policy("first", "default", "STRICT", "rsu-service"), policy("second", "default", "DISABLE", "rsu-service")
    )
    assert policies.mode("default", RSU, 8080, is_local=True) is MtlsMode.STRICT
    assert [problem.resource for problem in findings.all()] == ["PeerAuthentication default/second"]


def test_a_selector_in_the_root_namespace_has_no_effect_and_is_reported() -> None:
    policies, findings = authentications(policy("root", "istio-system", "STRICT", "rsu-service"))
    assert policies.mode("istio-system", RSU, 8080) is MtlsMode.PERMISSIVE
    assert policies.mode("default", RSU, 8080) is MtlsMode.PERMISSIVE
    assert "root namespace" in findings.all()[0].message
