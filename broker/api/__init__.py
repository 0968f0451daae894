"""The broker's D-Bus service: interfaces, arguments and answers."""
