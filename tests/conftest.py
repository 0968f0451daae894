"""What all tests of single modules share: hypothesis runs the same everywhere, within a time of its own."""

import os

from hypothesis import settings

# A loaded machine must not turn a slow example into a failure; in CI the examples are always the same.
settings.register_profile("default", deadline=None, max_examples=100)
settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")
