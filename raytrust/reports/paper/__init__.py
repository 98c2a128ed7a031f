"""The paper beside ours, as tables, figures and a page."""
