"""Buses that have the Containers1 interface themselves."""
