"""What goes into a measurement: models and their tokenizers, and long real text."""
