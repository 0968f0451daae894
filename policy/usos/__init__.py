"""Rules in the wire form a(usos), and conversion both ways."""
