"""What other software calls in place of its own: each module here keeps the interface that its callers know."""
