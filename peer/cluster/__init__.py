"""Who is here and who decides."""
