"""Command-line interface `cat-fast`: one file per command, without logic of its own."""
