"""One peer of a halka cluster: the agent, its stages and the words that a user types."""

VERSION = "0.1.0"
