"""Stand-ins and builders that tests of several modules share."""
