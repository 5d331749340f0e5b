"""What any serving engine's wing needs."""
