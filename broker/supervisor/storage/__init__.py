"""The state file and recovery after a loss."""
