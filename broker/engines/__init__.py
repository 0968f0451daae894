"""How a bus is mediated."""
