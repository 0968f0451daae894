import pytest

from broker.gate.dumps import HandoverError
from broker.gate.handover import self_check
from broker.gate.handover.self_check import check_judgement
from policy.match import Judge
from policy.rules import NO_ACCESS, AccessList, Identity


def test_this_gate_passes_its_own_test() -> None:
    check_judgement()


def test_gate_that_allows_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny_all(_access: AccessList, *, bus: str, me: Identity) -> Judge:
        return Judge(NO_ACCESS, bus=bus, me=me)

    monkeypatch.setattr(self_check, "Judge", deny_all)
    with pytest.raises(HandoverError, match="self check"):
        check_judgement()
