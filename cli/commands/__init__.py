"""What each command does; `cli.main` says how they are called. Each returns an exit code."""
