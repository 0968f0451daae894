"""D-Bus rules of snapd's interfaces, a TOML file each.

docs/policy.md has the format.
"""
