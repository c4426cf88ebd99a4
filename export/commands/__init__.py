"""The verbs of the command line that export."""
