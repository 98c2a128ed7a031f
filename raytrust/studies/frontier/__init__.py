"""The frontier of privacy, accuracy and bytes."""
