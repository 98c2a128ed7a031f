"""The audit of somebody's own model, in memory."""
