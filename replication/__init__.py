"""What makes state durable and shared: frames, the changelog, blobs, and the cluster's catalog."""
