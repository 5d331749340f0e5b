"""Models: where they come from, and which architectures are supported."""
