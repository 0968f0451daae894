"""The bridge to dbus-next, and the only package that uses asyncio."""
