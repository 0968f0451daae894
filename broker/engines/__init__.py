"""Engines, each a way to mediate a bus."""
