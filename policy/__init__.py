"""Rules: what a sandboxed app may do on a message bus. Pure; knows nothing of the broker."""
