"""The control plane: sandboxes, their lifetimes and state."""
