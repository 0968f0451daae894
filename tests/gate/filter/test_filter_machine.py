"""The state machine of integration/fuzz/machine.py for a short while; `make fuzz` runs it for longer."""

from typing import Final

import pytest
from hypothesis import HealthCheck, settings

from integration.fuzz.machine import FilterMachine

pytestmark = pytest.mark.slow

EXAMPLES: Final = 12
STEPS: Final = 20

TestFilterMachine: Final = FilterMachine.TestCase
TestFilterMachine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
