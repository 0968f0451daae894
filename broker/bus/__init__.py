"""The bridge to dbus-next: the one package that touches asyncio."""
