"""Places that an execution can go back to."""
