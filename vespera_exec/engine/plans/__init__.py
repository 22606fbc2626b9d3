"""Executes plans: the coordinator, what decides about failed steps, where a plan may go back to."""
