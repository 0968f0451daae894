"""Policy of other programs, read into rules: AppArmor, Flatpak, xdg-dbus-proxy."""
