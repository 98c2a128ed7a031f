"""The questions: what has to be done to answer each, and the rows it ends in."""
