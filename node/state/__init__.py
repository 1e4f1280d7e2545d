"""Customer state: row layouts, the fold, row codecs and the stores that keep rows."""
