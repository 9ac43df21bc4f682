"""Many samples, several methods: what is asked, kept on disk, and read again."""
