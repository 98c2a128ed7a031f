"""The programs: options, and each question from its configuration to its report."""
