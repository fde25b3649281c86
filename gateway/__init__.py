"""The north-south edge."""
