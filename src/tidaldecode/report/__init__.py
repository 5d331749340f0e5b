"""What measurements look like."""
