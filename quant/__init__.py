"""Number formats, recipes and error figures. Arrays in, arrays out: this room knows no model and no file."""
