"""The buswarden command, with a module for each command group."""
