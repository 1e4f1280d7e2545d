"""Tenants' models: manifests, features, the registry of versions, fair scheduling and sandboxed workers."""
