"""Plans, and where their steps stand."""
