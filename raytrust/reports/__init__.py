"""From rows to what a person reads: verdicts, figures and pages. No ray, mlflow or torch."""
