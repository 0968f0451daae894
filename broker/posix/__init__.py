"""Descriptors, files and folders, as POSIX and Linux have them: what the standard library lacks."""
