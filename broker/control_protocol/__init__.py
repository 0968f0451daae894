"""The protocol between supervisor and gate: messages, frames and files."""
