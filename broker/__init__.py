"""The broker: sockets for sandboxes, who is behind them, and what they may do."""
