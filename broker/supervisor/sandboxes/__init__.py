"""Sandboxes: records, life cycle, sockets and specifications."""
