"""The vocabulary of access rules: Rule, AccessList, Peer, Identity.

Everything that decides or stores access speaks in these types. They are values: frozen, comparable,
and encodable by msgspec. What a rule means is written down in docs/policy.md; `policy.match` carries
it out. Nothing here checks text from outside: `policy.text` and `policy.usos.wire_form` do.
"""

import enum
from typing import Final, Literal

import msgspec


class Access(enum.StrEnum):
    """The kind of access of a rule."""

    SEND = "send"  # method calls and signals out of the sandbox
    RECEIVE = "receive"  # method calls and signals into it
    OWN = "own"
    SEE = "see"


class Peer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The other end that a rule is about; without a Peer, any."""

    kind: Literal["host", "app", "same-app"]
    type: str = ""  # container type, with kind "app"
    app: str = ""  # app identifier, with kind "app"
    component: str | None = None  # with kind "app"; None is any component


class Identity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The app behind a connection. A host, in no sandbox, is None in our signatures."""

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
    origin: str = ""  # where the rule came from, for people


class AccessList(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All rules of one sandbox. Their order means nothing: deny beats allow."""

    rules: tuple[Rule, ...] = ()
    # The default for unicast calls and signals from the host that no rule is about: xdg-dbus-proxy
    # lets them in, snapd's AppArmor does not.
    receive_from_host: bool = True
    # Whether some calls to the bus itself, which every sandbox may make otherwise, need a send rule
    # as well (broker.gate.filter.driver_calls.BY_RULE_TOO): as under snapd's AppArmor.
    bus_by_rule: bool = False


NO_ACCESS: Final = AccessList()
