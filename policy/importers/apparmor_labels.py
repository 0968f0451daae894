"""AppArmor's labels of peers -> Peer.

    unconfined              the host
    snap.NAME.APP           the app io.snapcraft.snapd/NAME, component APP
    snap.NAME.*             any component of that app
    the profile's own name  the same component
    snap.OWN.*              the same app

A pattern of labels is expressed if the pattern means whole apps. Other patterns are expressed as
the matching labels among the labels that the caller knows. The rest cannot be expressed, because a
confined program that is no snap is a host peer for the broker.
"""

import re
import string
from collections.abc import Collection
from typing import Final

import msgspec

from policy.importers.aare import Alternative, Budget, CharSet, UnsayableError, Wild, alternatives
from policy.importers.aare_patterns import NAME, Kind, expand_sets
from policy.rules import Peer

SNAP: Final = "io.snapcraft.snapd"
UNCONFINED: Final = "unconfined"

_TAG: Final = re.compile(r"snap\.([a-z0-9-]+(?:_[a-z0-9]+)?)\.(.+)")
_STARS: Final = frozenset({"*", "**"})
_NO_SNAP: Final = "a label that is neither unconfined nor of a snap"
_HOST: Final = Peer(kind="host")
_LABEL: Final = Kind(
    what="label",
    plain=frozenset(string.printable) - frozenset(string.whitespace),
    classes=False,
    compile=NAME.compile,
)


class Labels(msgspec.Struct, frozen=True, kw_only=True):
    """The labels that patterns of peers are compared with."""

    own: str  # the profile's name, which labels programs under the profile
    known: Collection[str] = ()

    def peers(self, text: str, budget: Budget) -> tuple[tuple[Peer | None, ...], str]:
        """Return peers that together are no more than the pattern, and a text about omissions.

        A peer of None stands for any peer. Raises AareError and BudgetError.
        """
        found: dict[Peer | None, None] = {}
        left_out: list[str] = []
        try:
            for pieces in _alternatives(text, budget):
                try:
                    found.update(dict.fromkeys(self._peers(pieces)))
                except UnsayableError as exc:
                    left_out.append(str(exc))
        except UnsayableError as exc:
            return (), f"label {text[:60]!r}: {exc}"
        if None in found:
            return (None,), ""
        if _HOST in found:
            # The host includes the confined programs of the host.
            left_out = [each for each in left_out if not each.startswith(_NO_SNAP)]
        return tuple(found), "; ".join(left_out[:3])

    def is_own(self, peer: Peer | None) -> bool:
        """Return whether a peer is of the snap or program of the profile."""
        if peer is None or peer.kind == "same-app":
            return peer is not None
        own = _TAG.fullmatch(self.own)
        return own is not None and peer.type == SNAP and peer.app == own[1]

    def _peers(self, pieces: Alternative) -> list[Peer | None]:
        text = "".join(piece if isinstance(piece, str) else "" for piece in pieces)
        stars = [piece for piece in pieces if not isinstance(piece, str)]
        if not stars:
            return [self._peer(text)]
        if not text and all(isinstance(star, Wild) and star.text in _STARS for star in stars):
            return [None]
        last = pieces[-1]
        ends = len(stars) == 1 and isinstance(last, Wild) and last.text in _STARS
        if ends and (tag := _TAG.fullmatch(f"{text}x")) is not None and tag[2] == "x":
            return [self._app(tag[1])]
        shown = "".join(piece if isinstance(piece, str) else _shown(piece) for piece in pieces)
        known = [each for each in self.known if _TAG.fullmatch(each) or each == UNCONFINED]
        matching = [self._peer(each) for each in known if _matches(pieces, each)]
        if not matching:
            raise UnsayableError(f"a pattern of labels that are not known: {shown[:60]!r}")
        return list(matching)

    def _app(self, name: str) -> Peer:
        own = _TAG.fullmatch(self.own)
        if own is not None and own[1] == name:
            return Peer(kind="same-app")
        return Peer(kind="app", type=SNAP, app=name)

    def _peer(self, label: str) -> Peer:
        if label == UNCONFINED:
            return _HOST
        if (tag := _TAG.fullmatch(label)) is not None:
            return Peer(kind="app", type=SNAP, app=tag[1], component=tag[2])
        if label == self.own:
            return Peer(kind="same-app")
        raise UnsayableError(f"{_NO_SNAP}: {label[:60]!r}")


def _alternatives(text: str, budget: Budget) -> list[Alternative]:
    return [
        each
        for pieces in alternatives(text, budget)
        for each in expand_sets(pieces, _LABEL, budget)
    ]


def _shown(piece: Wild | CharSet) -> str:
    return piece.text if isinstance(piece, Wild) else "[…]"


def _matches(pieces: Alternative, label: str) -> bool:
    """Match a label by the set of places that the pattern can reach in the label."""
    places = {0}
    for piece in pieces:
        assert not isinstance(piece, CharSet)  # expand_sets wrote out the sets
        if isinstance(piece, str):
            places = {at + len(piece) for at in places if label.startswith(piece, at)}
        elif piece.text == "?":
            places = {at + 1 for at in places if at < len(label) and label[at] != "/"}
        elif piece.text == "*":
            places = _before_slash(places, label)
        elif places:
            places = set(range(min(places), len(label) + 1))
    return len(label) in places


def _before_slash(places: set[int], label: str) -> set[int]:
    reached: set[int] = set()
    for at in sorted(places):
        if at not in reached:
            stop = label.find("/", at)
            reached.update(range(at, (len(label) if stop < 0 else stop) + 1))
    return reached
