"""Running under systemd: notifications, stored descriptors and unit files."""
