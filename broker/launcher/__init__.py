"""Starting an app in a sandbox of its own."""
