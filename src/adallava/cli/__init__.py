"""The command line, ``adallava``; every command imports its work inside its function, so that help comes at once."""
