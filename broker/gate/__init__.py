"""The data plane: the process that serves the sockets of sandboxes and judges messages."""
