"""Fuzzing of what reads other people's bytes: one module a harness. docs/development.md says how."""
