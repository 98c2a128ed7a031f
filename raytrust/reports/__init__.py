"""From rows to what a person reads: text, figures, pages, and runs in MLflow. No ray."""
