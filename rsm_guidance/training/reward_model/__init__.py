"""What trains reward models on preferences."""
