"""What has failed for good, and how it is put back."""
