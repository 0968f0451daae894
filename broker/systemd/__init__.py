"""Being a service of systemd: what we tell it, what it keeps for us, and the units."""
