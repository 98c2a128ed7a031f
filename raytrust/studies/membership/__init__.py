"""The membership audit: shadow models, and what their outputs and messages betray."""
