"""The costs of messages, in known messages. No I/O.

The unit is a message whose header was judged before. Such a message takes some 30 µs of the machine's time: 4 in the
gate, the rest in the bus and in the receiver. The budget of a sandbox (`messages_per_second`) is counted in the same unit.
"""

from typing import Final

# A new or refused message of the app, which takes 50 to 100 µs more in the gate.
JUDGED_COST: Final = 5
# A message from the bus that has to be judged, on each connection that hears it. The cost with a remembered verdict is 1.
# See payers.py for the payer. The price of an app's call includes its reply, unless the gate has to read that (ANSWER_COST).
HEARD_COST: Final = 4
ANSWER_COST: Final = 1
# A question of the gate's own, with its answer: each is a message for the bus as well.
QUESTION_COST: Final = 5
# Each further message to the app about an owner change that shows or hides all names of the owner, for example.
TOLD_COST: Final = 1
# The messages that a second of the gate's time or of the bus's counts for: the default budget is 40 % of it.
BUSY_SECOND: Final = 62_500
# So many bytes cost a message more, because the gate, the bus and the receiver copy them.
BYTES_A_MESSAGE: Final = 3072
