"""`buswarden proxy`: the gate in one process of its own, under the command line of xdg-dbus-proxy."""
