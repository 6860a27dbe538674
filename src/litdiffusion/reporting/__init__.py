"""Pictures and words for people: grids, strips, GIFs by pillow; curves by matplotlib; the summary; the report.

``images`` and ``gif`` do without matplotlib, so that training and sampling need not wait for its import. The page,
``report.html``, draws its curves itself: plotly.js is 4.8 MB in each run folder, and the bundle of it that is smaller
has no parallel coordinates.
"""
