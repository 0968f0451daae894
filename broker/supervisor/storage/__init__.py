"""The state file and recovery from its loss."""
