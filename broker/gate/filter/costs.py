"""The costs of messages, in known messages. No I/O.

A message whose header was judged before is the unit. It takes some 30 µs of the machine's time: 4 in the gate, the rest
in the bus and in its receiver. The budget of a sandbox (`messages_per_second`) is counted in the same unit.
"""

from typing import Final

# A message of the app that is new or refused: it takes 50 to 100 µs more, in the gate.
JUDGED_COST: Final = 5
# A message from the bus that has to be judged, on each connection that hears it. With a remembered verdict it costs 1.
# See payers.py for the payer. The price of an app's call includes its reply, unless the gate has to read that (ANSWER_COST).
HEARD_COST: Final = 4
ANSWER_COST: Final = 1
# A question of the gate's own, with its answer: each is a message for the bus as well.
QUESTION_COST: Final = 5
# Each further message that the app is told of one owner change: the owner became visible, say, with all of its names.
TOLD_COST: Final = 1
# The messages that a second of the gate's time or of the bus's counts for: the default budget is 40 % of it.
BUSY_SECOND: Final = 62_500
# So many bytes cost a message more, because the gate, the bus and the receiver copy them.
BYTES_A_MESSAGE: Final = 3072
