"""D-Bus on the wire, without I/O: headers, authentication, names and match rules."""
