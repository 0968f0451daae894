"""A sandbox with its sockets, connections, budgets and reports."""
