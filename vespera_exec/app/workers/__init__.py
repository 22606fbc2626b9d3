"""Work that is done elsewhere: claimed, reported, concluded."""
