"""The interface files: the introspection XML of each interface, for share/dbus-1/interfaces."""
