"""The paper under test, side by side with what we measure: see `raytrust.studies.published` for its figures.

plan: what is tried, and by which budget; jobs: pieces of work, one file each; study: which of them are to be done;
selection: which setting comes nearest, which attack is strongest; theory: section 3, tested; rows: the tables; claims:
what became of each; assemble: all of these together. `raytrust.cli.paper` runs it, `raytrust.reports.paper` shows it.
"""
