"""Watches for the end conditions of sandboxes."""
