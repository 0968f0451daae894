"""Snaps: the catalogue of interfaces, and the compiler of their rules."""
