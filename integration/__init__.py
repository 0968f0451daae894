"""Tests with real buses and real clients, and the harness that they share."""
