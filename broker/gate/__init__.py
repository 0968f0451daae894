"""The data plane: the process that serves sandbox sockets and judges messages."""
