"""User study by ranking: a static page, and the tally of its answers."""
