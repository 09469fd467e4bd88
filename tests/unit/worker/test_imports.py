"""What a worker without QUIC must not load: each of these is megabytes in every worker of the mesh."""

import subprocess
import sys

import pytest

LIBRARIES = ("aioquic", "pylsqpack", "cryptography", "OpenSSL", "yaml", "prometheus_client")


@pytest.mark.parametrize("module", ["meshproxy.worker.process", "meshproxy.cli.run"])
def test_a_worker_loads_no_library_of_quic_or_of_control(module: str) -> None:
    script = f"import sys, {module}; print(*[name for name in {LIBRARIES} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_a_quic_listener_loads_them() -> None:
    """So that the test above cannot pass because the names are wrong."""
    script = "import sys, meshproxy.listener.quic; print('aioquic' in sys.modules, 'cryptography' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["True", "True"]
