"""The demo: a real year of shopping streamed through a node that runs three tenants' models."""
