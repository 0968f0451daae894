"""Snaps, and the connections of plugs to slots."""
