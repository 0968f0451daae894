"""Which bus was last met at each address. Another one has given unique names anew: whoever we knew by one is gone."""

import logging
from typing import Final

from broker.supervisor.state import State
from broker.wire.errors import CallRefusedError

LOGGER: Final = logging.getLogger(__name__)


class BusIds:
    """The ids by the buses' names, as they were in the state file and as they are now."""

    def __init__(self, state: State) -> None:
        self._state: Final = state
        self._ids: Final = state.load_bus_ids()

    def meet(self, bus: str, id_: str) -> bool:
        """Take note of who answers; say whether it is who did before. One never met before is."""
        before = self._ids.get(bus, id_)
        if self._ids.get(bus) != id_:
            self._ids[bus] = id_
            try:
                self._state.put_bus_id(bus, id_)
            except CallRefusedError as exc:
                LOGGER.warning("bus %s: %s", bus, exc)
        return before == id_
