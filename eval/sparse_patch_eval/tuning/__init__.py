"""Choice of a method and setting for each head, from measurements."""
