"""Event loop, streams, listeners and connecting: the gate's input and output."""
