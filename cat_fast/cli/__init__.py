"""The command `cat-fast`: thin, one file a command group, no logic of its own."""
