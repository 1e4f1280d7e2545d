"""The read interface for customers, features, inferences and models over HTTP."""
