"""What a plan costs in quality, compared with full attention."""
