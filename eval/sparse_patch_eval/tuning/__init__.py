"""Which method and setting each head runs, from measurements."""
