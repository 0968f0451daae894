"""The control plane: sandboxes, lifetimes and state."""
