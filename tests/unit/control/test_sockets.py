import errno
import select
import socket
from pathlib import Path

from meshproxy.control.sockets import ListeningSockets
from meshproxy.model.address import SocketAddress


class Supervisor:
    """What the supervisor is told to keep."""

    def __init__(self) -> None:
        self.kept: dict[SocketAddress, dict[int, socket.socket]] = {}

    def keep(self, address: SocketAddress, slot: int, sock: socket.socket) -> None:
        self.kept.setdefault(address, {})[slot] = sock.dup()

    def drop(self, address: SocketAddress) -> None:
        for sock in self.kept.pop(address).values():
            sock.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_each_worker_slot_has_its_own_socket_on_the_one_address() -> None:
    supervisor = Supervisor()
    sockets = ListeningSockets(2, supervisor.keep, supervisor.drop)
    address = SocketAddress("127.0.0.1", free_port())
    assert sockets.bind(address) is None
    assert sockets.bind(address) is None
    first, second = sockets.get(address, 0), sockets.get(address, 1)
    assert first is not second
    assert first.getsockname() == second.getsockname() == ("127.0.0.1", address.port)
    assert set(supervisor.kept[address]) == {0, 1}
    sockets.close_all()
    assert not supervisor.kept


def test_an_address_in_use_is_one_sentence() -> None:
    supervisor = Supervisor()
    with socket.socket() as other:
        # Even where the other shares its port: a second proxy of the same user must not take half of the traffic.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        sockets = ListeningSockets(2, supervisor.keep, supervisor.drop)
        assert (
            sockets.bind(SocketAddress("127.0.0.1", port)) == f"listener 127.0.0.1:{port}: cannot bind: address in use"
        )
        assert not sockets.addresses
        assert not supervisor.kept


def test_a_udp_port_is_another_than_the_tcp_port_of_its_number() -> None:
    supervisor = Supervisor()
    sockets = ListeningSockets(2, supervisor.keep, supervisor.drop)
    tcp = SocketAddress("127.0.0.1", free_port())
    udp = SocketAddress(tcp.host, tcp.port, is_udp=True)
    assert sockets.bind(tcp) is sockets.bind(udp) is None
    assert {sockets.get(udp, slot).type for slot in (0, 1)} == {socket.SOCK_DGRAM}
    assert set(supervisor.kept) == {tcp, udp}
    sockets.close(tcp)
    for _ in range(64):  # each from another port, so that the kernel spreads them
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (udp.host, udp.port))
    for slot in (0, 1):
        assert sockets.get(udp, slot).recv(1) == b"x"
    sockets.close_all()
    assert not supervisor.kept


def test_a_udp_address_in_use_is_one_sentence() -> None:
    supervisor = Supervisor()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        sockets = ListeningSockets(1, supervisor.keep, supervisor.drop)
        sentence = f"listener 127.0.0.1:{port}/udp: cannot bind: address in use"
        assert sockets.bind(SocketAddress("127.0.0.1", port, is_udp=True)) == sentence
        assert not supervisor.kept


def test_an_address_this_host_does_not_have_is_one_sentence() -> None:
    sockets = ListeningSockets(1, lambda *_: None, lambda _: None)
    # TEST-NET-1, RFC 5737
    assert (
        sockets.bind(SocketAddress("192.0.2.1", 80))
        == "listener 192.0.2.1:80: cannot bind: this host has no such address"
    )


def test_connections_of_a_dead_worker_wait_for_its_replacement() -> None:
    sockets = ListeningSockets(1, lambda *_: None, lambda _: None)
    address = SocketAddress("127.0.0.1", free_port())
    assert sockets.bind(address) is None
    workers_copy = sockets.get(address, 0).dup()
    with socket.create_connection((address.host, address.port)) as client:
        client.send(b"hello")
        workers_copy.close()  # the worker died before it accepted
        sockets.get(address, 0).setblocking(True)
        accepted, _ = sockets.get(address, 0).accept()
        with accepted:
            assert accepted.recv(5) == b"hello"
    sockets.close_all()


def test_a_stale_unix_socket_is_taken_over_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "proxy.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    sockets = ListeningSockets(2, lambda *_: None, lambda _: None)
    address = SocketAddress(path, 0)
    assert sockets.bind(address) is None
    assert sockets.get(address, 0) is sockets.get(address, 1)
    other = ListeningSockets(2, lambda *_: None, lambda _: None)
    assert other.bind(address) == f"listener {path}: cannot bind: address in use"
    sockets.close(address)
    assert not Path(path).exists()


def test_a_file_in_the_way_of_a_unix_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    sockets = ListeningSockets(1, lambda *_: None, lambda _: None)
    assert sockets.bind(SocketAddress(str(path), 0)) == f"listener {path}: cannot bind: address in use"
    assert path.read_text() == "data"


def test_adopted_sockets_are_not_bound_again() -> None:
    before = ListeningSockets(1, lambda *_: None, lambda _: None)
    address = SocketAddress("127.0.0.1", free_port())
    assert before.bind(address) is None
    copy = before.get(address, 0).dup()
    after = ListeningSockets(1, lambda *_: None, lambda _: None, [(address, 0, copy)])
    assert after.bind(address) is None
    assert after.get(address, 0) is copy
    before.close_all()
    after.close_all()


def test_a_drain_keeps_what_waits_in_the_queue_and_lets_nothing_new_begin() -> None:
    sockets = ListeningSockets(1, lambda *_: None, lambda _: None)
    address = SocketAddress("127.0.0.1", free_port())
    assert sockets.bind(address) is None
    workers_copy = sockets.get(address, 0).dup()
    with socket.create_connection((address.host, address.port)) as early, socket.socket() as late:
        sockets.refuse_new()
        late.setblocking(False)
        assert late.connect_ex((address.host, address.port)) != 0
        assert not select.select([], [late], [], 0.05)[1]
        sockets.close_all()
        accepted, _ = workers_copy.accept()
        workers_copy.close()
        early.send(b"hello")
        assert accepted.recv(5) == b"hello"
        accepted.close()
        assert select.select([], [late], [], 5)[1]  # its next SYN, a second later, is answered by a reset
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def test_datagrams_of_quic_go_to_the_worker_that_their_connection_id_names() -> None:
    supervisor = Supervisor()
    sockets = ListeningSockets(3, supervisor.keep, supervisor.drop)
    address = SocketAddress("127.0.0.1", free_port(), is_udp=True)
    assert sockets.bind(address, is_quic=True) is None
    of_slots = [sockets.get(address, slot) for slot in range(3)]
    for first in range(12):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:  # from another port each time
            short = b"\x40" + bytes((first,)) + b"id" * 10
            long = b"\xc0\x00\x00\x00\x01\x08" + bytes((first,)) + b"id" * 10
            for data in (short, long):
                client.sendto(data, ("127.0.0.1", address.port))
                ready, _, _ = select.select(of_slots, [], [], 5)
                assert ready == [of_slots[first % 3]]
                assert ready[0].recv(100) == data
    sockets.close_all()
