"""The questions that are asked, one module each: what is to be done, and the rows it ends in."""
