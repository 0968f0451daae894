"""Whatever one app's bytes do ends its link at the worst, and what its creator does its sandbox: the one place that catches it."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from broker.gate.io.stream import StreamClosedError
from broker.wire.errors import BrokerError, PeerProtocolError, PeerQuotaError

if TYPE_CHECKING:
    from broker.gate.sandbox.connection import AppConnection
    from broker.gate.sandbox.sandbox import Sandbox

Arguments = ParamSpec("Arguments")


def ends_connection_on_error(
    method: Callable[Concatenate["AppConnection", Arguments], None],
) -> Callable[Concatenate["AppConnection", Arguments], None]:
    """Whatever goes wrong with one peer ends its link, and nothing else."""

    @functools.wraps(method)
    def guarded(
        self: "AppConnection", /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> None:
        try:
            method(self, *args, **kwargs)
        except BlockingIOError:
            pass  # woken for nothing
        except StreamClosedError:
            self.close("closed")
        except (PeerProtocolError, PeerQuotaError) as exc:
            self.sandbox.limited_log.warning("peer-violation", str(exc))
            self.close(str(exc))
        except (OSError, BrokerError) as exc:
            self.sandbox.limited_log.warning("peer-lost", str(exc))
            self.close(str(exc))
        except MemoryError:
            self.sandbox.limited_log.warning("peer-lost", "no memory for what it sent")
            self.close("no memory")
        except Exception:  # noqa: BLE001 - one sandbox's bytes must not end the gate, whatever we did wrong
            self.sandbox.limited_log.warning("peer-defect", traceback=True)
            self.close("defect")

    return guarded


def ends_sandbox_on_error(
    method: Callable[Concatenate["Sandbox", Arguments], None],
) -> Callable[Concatenate["Sandbox", Arguments], None]:
    """Whatever goes wrong with a sandbox's own descriptors ends it, and nothing else."""

    @functools.wraps(method)
    def guarded(self: "Sandbox", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:  # noqa: BLE001 - as above
            self.limited_log.warning("sandbox-defect", traceback=True)
            try:
                self.stop("stopped")
            except Exception:  # noqa: BLE001
                self.limited_log.warning("sandbox-defect", traceback=True)

    return guarded
