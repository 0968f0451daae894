"""`buswarden proxy`: the gate as a replacement of xdg-dbus-proxy, without a supervisor."""
