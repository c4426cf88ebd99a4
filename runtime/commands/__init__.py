"""The command line of the runtime; `main` has every verb."""
