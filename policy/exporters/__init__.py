"""Rules written as policy of other programs, with a list of omissions."""
