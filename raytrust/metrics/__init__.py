"""What is measured, as pure functions on arrays: images, membership scores, intervals, and what they allow one to say.

`images` has the similarity of images; `roc` curves and areas of membership scores, `thresholds` decisions by them,
`membership` what an audit reports, with the differential privacy that the scores refute; `statistics` figures with
their intervals; `verdict` the rule by which a defence leaks, resists or is undecided. A membership score is one number
a point, and higher always means member. All errors are a `ValueError` of one line.
"""
