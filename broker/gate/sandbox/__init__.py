"""A sandbox in the gate: sockets, connections, budgets and reports."""
