"""What clients see: the local HTTP endpoint."""
