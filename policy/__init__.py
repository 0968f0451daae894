"""Access rules for sandboxed apps on a message bus. Pure, and independent of the broker."""
