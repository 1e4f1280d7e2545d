"""The operator's interface: status, health, metrics and the problem documents."""
