"""Shows what our scheduler, or our router, does among parts of other stacks."""
