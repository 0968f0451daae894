"""Snaps, and the connections of their plugs to slots."""
