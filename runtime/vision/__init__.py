"""Pictures in, rows for a text model out."""
