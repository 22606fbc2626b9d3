"""Plans: what may be asked of them, their files, and the tasks of their steps."""
