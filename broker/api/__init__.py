"""What others call: the D-Bus service."""
