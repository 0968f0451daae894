"""The sandboxes: their records, life cycle, sockets and specifications."""
