"""`buswarden upgrade`, against a broker that is a fake."""

from broker.wire.errors import FAILED, CallRefusedError
from tests.cli import test_main
from tests.cli.test_main import Broker, Run

broker, run = test_main.broker, test_main.run  # fixtures


def test_it_says_which_process_serves_now(run: Run, broker: Broker) -> None:
    broker.answers["Upgrade"] = [11, 12]
    assert run("upgrade") == (0, "the gate is process 12 now, instead of 11\n", "")


def test_why_it_did_not_work_is_one_line(run: Run, broker: Broker) -> None:
    text = "the new gate does not take over: the other gate ended"
    broker.answers["Upgrade"] = CallRefusedError(FAILED, text)
    assert run("upgrade") == (1, "", f"buswarden: {text}\n")
