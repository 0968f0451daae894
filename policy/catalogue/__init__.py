"""What snapd's interfaces may do on D-Bus: one TOML file an interface. docs/policy.md has the format."""
