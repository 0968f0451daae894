"""Errors by cause. The class of an error decides the consequence (docs/design.md)."""

from typing import Final

ACCESS_DENIED: Final = "org.freedesktop.DBus.Error.AccessDenied"
DISCONNECTED: Final = "org.freedesktop.DBus.Error.Disconnected"
FAILED: Final = "org.freedesktop.DBus.Error.Failed"
INVALID_ARGS: Final = "org.freedesktop.DBus.Error.InvalidArgs"
LIMITS_EXCEEDED: Final = "org.freedesktop.DBus.Error.LimitsExceeded"
MATCH_RULE_INVALID: Final = "org.freedesktop.DBus.Error.MatchRuleInvalid"
MATCH_RULE_NOT_FOUND: Final = "org.freedesktop.DBus.Error.MatchRuleNotFound"
NAME_HAS_NO_OWNER: Final = "org.freedesktop.DBus.Error.NameHasNoOwner"
NO_REPLY: Final = "org.freedesktop.DBus.Error.NoReply"
NOT_CONTAINER: Final = "org.freedesktop.DBus.Error.NotContainer"
NOT_SUPPORTED: Final = "org.freedesktop.DBus.Error.NotSupported"
SERVICE_UNKNOWN: Final = "org.freedesktop.DBus.Error.ServiceUnknown"
UNKNOWN_METHOD: Final = "org.freedesktop.DBus.Error.UnknownMethod"
UNKNOWN_INTERFACE: Final = "org.freedesktop.DBus.Error.UnknownInterface"
UNKNOWN_PROPERTY: Final = "org.freedesktop.DBus.Error.UnknownProperty"


class BrokerError(Exception):
    """The base class of this project's errors."""


class PeerProtocolError(BrokerError):
    """The peer broke the protocol. The peer's connection ends."""


class PeerQuotaError(BrokerError):
    """The peer took more than its share. The peer's connection ends."""


class CallRefusedError(BrokerError):
    """A legal call is refused. The answer is `dbus_name`, and the connection goes on."""

    def __init__(self, dbus_name: str, text: str) -> None:
        super().__init__(text)
        self.dbus_name: Final = dbus_name


class ConfigError(BrokerError):
    """The operator's input is wrong. The program prints one line and exits with status 2."""
