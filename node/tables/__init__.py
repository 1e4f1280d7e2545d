"""Tables: global data with a key, whole on every node, in versions."""
