"""The node: one uvloop process, the partitions it owns and its HTTP interface."""
