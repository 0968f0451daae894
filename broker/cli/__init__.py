"""The buswarden command, one module a command group."""
