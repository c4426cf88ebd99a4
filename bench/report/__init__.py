"""What was measured, as a page."""

PAGE_BEGINS = b'<!DOCTYPE html>\n<html lang="en"><head><meta name="generator" content="bezel">'
"""How `page.write_page` begins each: an earlier report is told from other files by it, without what writes them."""
