"""Questions with one right answer."""
