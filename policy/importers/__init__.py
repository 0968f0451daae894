"""Other people's policy, read into rules: AppArmor profiles, Flatpak metadata, xdg-dbus-proxy arguments."""
