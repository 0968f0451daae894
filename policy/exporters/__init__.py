"""Rules written as other people's policy, with a list of what it cannot say."""
