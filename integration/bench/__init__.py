"""What the gate costs, beside xdg-dbus-proxy and no mediator at all. See docs/performance.md."""
