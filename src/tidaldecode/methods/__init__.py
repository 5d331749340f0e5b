"""What attends in a decode step: one file a method, with one protocol (`protocol`) and one registry (`method`)."""
