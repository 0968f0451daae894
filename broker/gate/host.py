"""A sandbox, as each of its connections sees it. No I/O."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from broker.gate.control import SandboxLimits
from policy.rules import Identity

if TYPE_CHECKING:
    from broker.gate.core import Core, Denial


class Host(Protocol):
    """What the connection needs of the sandbox it belongs to."""

    bytes_held: int

    @property
    def id(self) -> str:
        """Its id, cN."""

    @property
    def identity(self) -> Identity:
        """Which app it is."""

    @property
    def limits(self) -> SandboxLimits:
        """What it may take."""

    @property
    def cores(self) -> Collection["Core"]:
        """Its connections, those in their handshakes left out."""

    def denied(self, core: "Core", denial: "Denial") -> None:
        """Report a refusal."""

    def said_hello(self, core: "Core") -> None:
        """Register `core.unique_name`, before the app gets to know it."""

    def close_fds(self, fds: Sequence[int]) -> None:
        """Close descriptors."""
