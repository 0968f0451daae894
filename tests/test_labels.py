"""Whether somebody listens where a bus says; the rest of the module is tested with the engine."""

import socket
from pathlib import Path

import pytest

from broker.engines.labels import _check_reachable
from broker.wire.errors import CallRefusedError


def test_a_socket_that_somebody_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(0)
        for _ in range(3):  # a backlog that is full is no reason
            _check_reachable(f"unix:path={tmp_path}/s")


@pytest.mark.parametrize("address", ["unix:path=/nowhere", "tcp:host=x", "", "nonsense"])
def test_an_address_that_leads_nowhere(address: str) -> None:
    with pytest.raises(CallRefusedError):
        _check_reachable(address)
