"""What a config will cost, without running it."""
