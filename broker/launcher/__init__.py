"""Starting a command in a sandbox that has buses of its own."""
