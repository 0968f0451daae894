"""Starting real buses, programs and supervisors for tests."""
