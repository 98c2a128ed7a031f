"""Work as values: a store that keeps what is done, a runner that does the rest, locks, progress and whole files."""
