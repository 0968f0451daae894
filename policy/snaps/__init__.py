"""Snaps: the catalogue of interfaces, and the compiler of the interfaces' rules."""
