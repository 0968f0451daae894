"""Support for buses that have the Containers1 interface."""
