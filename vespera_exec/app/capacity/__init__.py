"""Shared capacity, as the settings name it and as it is shown."""
