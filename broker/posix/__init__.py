"""Descriptors, files and folders on POSIX and Linux, beyond the standard library."""
