"""The networks that are trained and attacked."""
