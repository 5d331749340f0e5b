"""What attends in a decode step: one file a method."""
