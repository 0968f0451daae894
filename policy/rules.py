"""The vocabulary of access rules: Rule, AccessList, Peer, Identity.

All code that decides or stores access uses these types. The types are values: frozen, comparable,
and encodable by msgspec. docs/policy.md defines the meaning of a rule, and `policy.match`
implements the meaning. Text from outside is checked by `policy.text` and `policy.usos.wire_form`,
not here.
"""

import enum
from typing import Final, Literal

import msgspec


class Access(enum.StrEnum):
    """The kind of access of a rule."""

    SEND = "send"  # method calls and signals out of the sandbox
    RECEIVE = "receive"  # method calls and signals into the sandbox
    OWN = "own"
    SEE = "see"


class Peer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The other end of a message as a rule's condition.

    A rule without a Peer matches any other end.
    """

    kind: Literal["host", "app", "same-app"]
    type: str = ""  # container type, with kind "app"
    app: str = ""  # app identifier, with kind "app"
    component: str | None = None  # with kind "app"; None is any component


class Identity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The app behind a connection.

    In signatures None stands for a host, which is in no sandbox.
    """

    type: str
    app: str
    component: str | None = None


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An allow or deny rule. A field that is None matches anything."""

    access: frozenset[Access]
    deny: bool = False
    bus: str | None = None
    name: str | None = (
        None  # exact, subtree `org.example.*`, or a glob in which * and ? match anything
    )
    path: str | None = None  # a glob: * and ? stop at /, ** does not, [..], {a,b}
    interface: str | None = None  # a glob
    member: str | None = None  # a glob
    peer: Peer | None = None
    origin: str = ""  # the source of the rule, for people


class AccessList(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All rules of a sandbox. The order has no meaning, because deny beats allow."""

    rules: tuple[Rule, ...] = ()
    # The default for unicast calls and signals that match no rule, from the host and from
    # connections of the same app: xdg-dbus-proxy lets such messages in, and snapd's AppArmor does
    # not. The default also lets a connection send to itself.
    receive_from_host: bool = True
    # With this flag some calls to the bus itself need a send rule, as under snapd's AppArmor. All
    # sandboxes may make these calls otherwise (policy.bus_calls.BY_RULE_TOO).
    bus_by_rule: bool = False


NO_ACCESS: Final = AccessList()
