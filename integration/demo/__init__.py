"""Guided tours of the broker: one on a stock bus, one on a bus that labels."""
