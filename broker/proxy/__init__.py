"""`buswarden proxy`: the gate as a single process, with the command line of xdg-dbus-proxy."""
