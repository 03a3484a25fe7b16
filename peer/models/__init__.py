"""What is run: models as parts, their words and their templates."""
