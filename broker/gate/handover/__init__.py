"""Handing all state over from one gate process to the next."""
