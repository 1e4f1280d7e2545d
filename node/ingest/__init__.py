"""Events in: Kafka sources, decoding into columns, and the reasons events are refused."""
